"""How a dataset was made, as its card says it: command, models, citation.

Models and inputs are named by their hub ids or by their last names: a folder of the machine that
made it tells a reader nothing.
"""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath

from stream_engine.config import RunConfig, names_of
from stream_engine.servers import PREFIX, ServerConfig

IN_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)")
"""A checkpoint in the hub's cache."""
HUB_DATASETS = "hf://datasets/"
LOCAL = ("work_dir", "image_root", "offload_path", "reward_model_python_path")
"""Settings that hold paths of one machine alone."""
PATHS = (
    *("instruct_model_path", "reward_model_path", "base_model_path", "vision_tower_path"),
    *("dataset_path", "sampler"),
)
NOT_SHOWN = (
    *LOCAL,
    "overwrite",
    "run_stage",
    "debug",
    "device",
    "pretty_name",
    "license",
    "track",
    "report",
    "token_prices",
    *(name for name in names_of(ServerConfig) if name.startswith("server_")),
)

RLAIFV = """\
@article{yu2024rlaifv,
  title   = {RLAIF-V: Open-Source AI Feedback Leads to Super GPT-4V Trustworthiness},
  author  = {Tianyu Yu and Haoye Zhang and Qiming Li and Qixin Xu and Yuan Yao and Da Chen and
             Xiaoman Lu and Ganqu Cui and Yunkai Dang and Taiwen He and Xiaocheng Feng and Jun Song
             and Bo Zheng and Zhiyuan Liu and Tat-Seng Chua and Maosong Sun},
  journal = {arXiv preprint arXiv:2405.17220},
  year    = {2024}
}"""
LLAVA_CRITIC = """\
@article{xiong2024llavacritic,
  title   = {LLaVA-Critic: Learning to Evaluate Multimodal Models},
  author  = {Tianyi Xiong and Xiyao Wang and Dong Guo and Qinghao Ye and Haoqi Fan and Quanquan Gu
             and Heng Huang and Chunyuan Li},
  journal = {arXiv preprint arXiv:2410.02712},
  year    = {2024}
}"""
DPO = """\
@inproceedings{rafailov2023dpo,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and
               Christopher D. Manning and Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}"""
CITATIONS = {
    "dpo_reward": (RLAIFV, DPO),
    "divide_and_conquer": (RLAIFV, DPO),
    "llava_critic": (LLAVA_CRITIC, DPO),
}


def model_name(path: str) -> str:
    """A model setting without folders: `owner/name@revision`, or the folder's own name.

    Several models, as divide_and_conquer has them, stay separated by commas.
    """
    return ",".join(map(one_name, path.split(",")))


def one_name(path: str) -> str:
    """The same of one model, or of one input."""
    if path.startswith(PREFIX):
        return f"{PREFIX}URL#{path.partition('#')[2]}"
    if found := IN_CACHE.search(path):
        return f"{found['owner']}/{found['name']}@{found['revision'][:12]}"
    if path.startswith(HUB_DATASETS):
        return path.removeprefix(HUB_DATASETS)
    if path.startswith(("/", ".", "~")) or "://" in path:
        return PurePosixPath(path.rstrip("/")).name
    return path


def shown_settings(config: RunConfig) -> dict[str, str | int | float | bool]:
    """Every setting that has a value, without folders of this machine."""
    given = config.to_dict()
    given |= given.pop("pipeline_options")
    return {
        name: setting_text(name, value) if isinstance(value, str | list | dict) else value
        for name, value in given.items()
        if name not in LOCAL and value not in (None, "", [], {})
    }


def command_line(config: RunConfig) -> str:
    """The command that makes the dataset again, of every setting that is not the default."""
    defaults, given = RunConfig().to_dict(), config.to_dict()
    given |= given.pop("pipeline_options")
    words = ["stream-engine run"]
    for name, value in given.items():
        if name in NOT_SHOWN or value == defaults.get(name):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        text = setting_text(name, value)
        words.append(f"--{name} {shlex.quote(text)}")
    return " \\\n    ".join(words)


def setting_text(name: str, value: object) -> str:
    """A setting's value as it is given on a command line, paths by their last names."""
    if isinstance(value, dict):
        return ",".join(f"{ours}={theirs}" for ours, theirs in value.items())
    parts = value if isinstance(value, list | tuple) else [value]
    texts = [str(part) for part in parts]
    if name in PATHS:
        texts = [model_name(text) for text in texts]
    return ",".join(texts)


def citation(pipeline: str) -> str:
    """What to cite for pairs of this pipeline, as BibTeX."""
    return "\n\n".join(CITATIONS.get(pipeline, (DPO,)))
