"""What the help of a command says below its flags: reference that no single flag could hold."""

from __future__ import annotations

INPUT = """\
what is read:
  parquet, arrow, `datasets` folders    question; image, images or image_path; idx, question_id
                                        or id
  jsonl, ndjson, json lists, csv, tsv   the same, or conversations (LLaVA), messages, prompt (TRL);
                                        also .gz .bz2 .xz .zst
  WebDataset tars                       key.json or key.txt, and the pictures beside it, in the
                                        order in which the json names them, else that of their
                                        names; also compressed or concatenated
  A source is a file, a folder (linked ones are followed), a glob or braces (train-{000..012}.tar)
  in quotes, an fsspec URL (s3:// needs the package s3fs, gs:// gcsfs), or a dataset of the Hugging
  Face hub, taken from its cache where there is no network.
  A picture is bytes, base64, a data URL, a path (from --image_root, else from the file that it
  stands in), a file:// URL, or a dict with one of these.
  Ids are unique within an input; two inputs may use the same. Without any they are made from the
  content. A row that was edited under the same id is called changed_row and keeps its first
  reading; removed rows stay in the run and are counted.
  A question has as many <image> marks as pictures, or none: the pictures then come first. Marks
  inside the text are the pictures' places, for the model and in the exported rows; LLaVA-1.5,
  which sees pictures first, is asked without them, and so says the row. Marks of other tools
  (<ImageHere>, <|image_pad|>) are text, and counted. Of a conversation the first question is asked;
  with a system prompt, earlier turns or a video it would not be the same, and is rejected.
  Stored is the picture that everybody sees: transparency goes on white, 16 bits become 8, CMYK
  becomes RGB, a moving picture its first frame, EXIF rotation is done; all others keep their
  bytes. A JPEG whose data are broken in the middle is rejected.
  Answers come along as `answers`: texts, or {text, model, finish_reason}. These are scored and
  none is sampled; --sample_k does not bind them. A pair needs two that differ, so that answers of
  several models to one question stand in one row; --rank is lowered to half their number.
  --given_answers pairs reads `chosen` and `rejected` too, as TRL, RLAIF-V, ms-swift and
  LLaMA-Factory write them: each pair is scored again, `status` says how many the scorer reverses,
  and --disagreements keeps, relabels or drops those. The ids of such answers are made from their
  texts, and an end token is put behind, unless finish_reason is length. Other answers are another
  sample; the ids of samples may then repeat.
  Text stays text: a question that spells a control token of the model, or its template's words
  for a turn, is rejected.
"""

PAIRS = """\
how pairs are chosen:
  The best --rank answers of a question are paired with the worst --rank. Near duplicates, empty
  and equal answers are dropped and lengths are balanced; stats.json counts each dropped pair by
  its reason. Flags and defaults are those of RLAIF-V's data engine, and so are the rules but for
  its corner cases and for whom a critic's best answers are paired with (there the i-th best with
  the i-th of the worst, as --strict_follow_rank); --compat rlaifv follows those too, where they
  are well defined. divide_and_conquer draws two pairs of a question by lot, as RLAIF-V does, unless
  --fact_pairs ranked is given; with --strict_follow_rank each answer is then in one pair at most.
  A word is a run without white space, in Chinese and Japanese a character. RLAIF-V counts those of
  nltk.word_tokenize (punctuation and the halves of "don't" are words, a run of Chinese is one) and
  takes 10-grams of jieba.cut (spaces and punctuation are tokens: ten are about five English
  words). So --distance, the length balance and the near-duplicate test decide differently near
  their thresholds. It also draws which pairs of a question stay, unseeded; here the first do.
"""

BATCH = """\
the batch:
  Rows, prefill and cache are computed from the memory that is free and tried at full size when the
  models are loaded; --max_rows and --max_batch_tokens bound them, and running out of memory halves
  them instead of failing. With --look_ahead (auto: on an accelerator) the batch depends on timing,
  and log-probs on it in their last bits, in bfloat16 now and then a token too; with --look_ahead
  never every shard is kept by itself. On CPU --dtype bfloat16 halves what decoding reads.

the models:
  The family is read from config.json. No code from a checkpoint is run; pickled weights are read
  as tensors only. A model of the hub is fetched once a node, safetensors only, and found in the
  cache offline. A model whose attention cannot share a prefix (sliding windows, attention sinks)
  runs through its own KV cache instead, and run.json says so. --tensor_parallel 2 makes four
  workers of eight ranks (torchrun --nproc_per_node 8).
"""

WORK_DIR = """\
the work directory:
  A folder that all workers see, or an object store: s3://, gs:// or az:// and bucket/folder. That
  needs `pip install 'stream-engine-dpo[s3]'` (obstore, boto3). s3:// finds credentials, profile,
  region and address as the AWS tools do (AWS_ENDPOINT_URL for other servers); gs:// and az:// take
  what obstore reads of the environment. The store must know conditional puts (If-None-Match,
  If-Match). Logs are written there every 30 s and at the end, their last MiB; no report is made by
  itself (`stream-engine report WORK_DIR --out FOLDER` makes one). A merge writes the dataset to
  this machine's temporary folder (TMPDIR) first and needs room for it there. A shard and its
  results go in one request each, of which S3 takes 5 GB: give fewer --samples_per_shard beyond.
  Files are created only where there are none of that name, and replaced only over the version
  that was read: a worker that was stopped and wakes up overwrites nothing. An empty file stands
  for a removed one.
    run.json                           settings, fingerprints, versions, resolved sampling values
    shards/000012.tar                  WebDataset tars; manifest.jsonl, continued in
                                       manifest-00001.jsonl, has their samples and checksums
    results/rollouts/000012.msgpack    answers;  results/rewards/000012.msgpack  scores
    rankings/000012.msgpack            what ranking made of these; may be deleted, a merge that
                                       needs it makes it again; *.milestones, what merges counted
    failures/000012.json               why a shard failed
    quarantine/                        records set aside, with their reasons; a file's name ends in
                                       random digits, and a result or the manifest names it
    damaged/                           results whose bytes were found changed
    dataset/                           train-00000-of-000NN-<hash>.parquet; README.md, the card,
                                       names them and is replaced last; stats.json has the size and
                                       checksum of every file; for RLAIF-V's trainer the empty
                                       train-logps.parquet
    dataset_<format>/                  the formats after the first
    rounds/2/dataset/                  the pairs of one round alone, in a run of several
    leases/  logs/  debug/  report/index.html
"""

RESUME = """\
again:
  The same command resumes. Finished shards are never computed twice, and a finished run loads no
  model. The number of workers and nodes and the launcher may change in between; the answers do
  not. Changed settings are refused by name, or --overwrite discards exactly the stages concerned;
  --rank, filters and formats only merge again.
  A finished file that is found damaged fails its shard: the dataset is built from the others, and
  `retry-failed` computes a damaged result again. A damaged tar wants its copy put back first.
  A worker holds a shard by a lease that it renews. When it dies, another takes the shard over: at
  once on the same host, after --lease_timeout_s elsewhere.
"""

ROUNDS = """\
rounds:
  The next --questions that the run has not got, of the inputs that it has and of those given here,
  are answered under the settings of this line and, where it names none, those of the round before:
  another --instruct_model_path, most of all. What is finished is never answered again. Each pair
  tells its round; dataset/ holds the pairs of all, rounds/2/dataset those of round 2, for a trainer
  that wants the newest only. Lengths are balanced within a round, so that a round's pairs stay as
  they are. The round before must be finished; what failed in it may be retried at any time, and is
  answered by its own models, which must be what they were. With --round N the same line resumes
  round N, and a finished one is left as it is: launch/train_in_rounds.sh trains between rounds.
  Or one file tells of all: `stream-engine run --config run.yaml` with a list `rounds` in it, whose
  entries say what differs in each (`- {instruct_model_path: /models/round-1, questions: 4000}`).
  It goes on with the round that is not finished, and on, until the model of one is not there yet.
  dpo_reward tells rewards against the model that answers; --base_model_path names another, as the
  one that the reward model was trained from. In the drawn world the newest model was the better.
"""

STATUS = """\
exit status:
  0 done; 1 a setting is wrong or the store fails (one line says what); 2 finished, but shards or
  records failed, or samples were scored and no pair was written. torchrun takes any status but 0
  for a crash and turns it into 1: give --failures_ok under it, and ask `stream-engine status
  WORK_DIR --check` afterwards.
"""

RETRY = """\
what is tried again:
  Failed shards, records that a stage set aside, damaged results, and the inputs with rejected
  records: a picture that was missing may be there by now.
"""

PUBLISHED = """\
what is written:
  Rows lie in train-00000-of-000NN-<hash>.parquet; README.md, the card, names them and is replaced
  last; stats.json has the size and checksum of every file, which `stream-engine validate` checks.
  Every format holds ids, scores, the margin and what the input said of a row's origin. --out may
  be a folder or an object store (s3://, gs://, az://). OpenRLHF and verl train on texts only: a
  picture would be lost, so there is no format for them.
"""

RANKED = """\
what is written:
  ranked (the default): a row a question, with all its answers, best first: scores, ranks, token
  ids and log-probs, finish reason, who wrote it. `stream-engine run --dataset_path FOLDER` takes
  it as an input, and scores these answers in place of sampled ones.
  trl_sft (by itself with --best N): the N best answers of each question for TRL's SFTTrainer, those
  left out that were cut off, are empty or near duplicates of better ones: rejection sampling.
  trl_kto: answers with a label for TRL's KTOTrainer. The best --rank of the run are true, the worst
  --rank false; each that is true was scored higher than each that is false.
  Pairs for TRL's RewardTrainer are `stream-engine export --format trl_reward`.
  Each lies in dataset_<format>/ with a card and stats.json, which counts every answer; with
  --round N those of one round alone, in rounds/N/.
"""

VALIDATED = """\
what is checked:
  Of an input, every row that would be rejected is named with where it is and why, with one remedy
  for each kind, and so is every file, column and member of a tar that would not be read. Of a run
  or dataset, every file's size and checksum, and every row.
"""

SHOWN = """\
what is shown:
  All pairs are counted; --rows of them are drawn by the run's seed, and the extremes and some of
  what each reason dropped come on top. The page loads nothing from elsewhere and has no inline
  script: copy its folder to whoever is to see it. J and K go through the pairs. With a pair stand
  all answers of its question and what their scores are made of: dpo_reward has each token's
  log p_reward - log p_instruct; divide_and_conquer the facts, their questions, p(yes), p(no) and
  verdicts; llava_critic the critic's words in both orders. Of a run in an object store a report
  goes to --out on a disk.
"""

PUSHED = """\
what is pushed:
  The dataset's folder, from a disk: export a run's pairs from an object store with --out first,
  and push that folder. The token and address are those of huggingface_hub. Files that arrived
  before an interruption are not sent again.
"""

RUN = "\n".join([INPUT, PAIRS, BATCH, WORK_DIR, RESUME, STATUS])
