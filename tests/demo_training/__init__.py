"""Training of the demo checkpoints. Each script writes one, from a seed, on one core:

    python -m tests.demo_training.base     --out DIR    # 10 min; the truthful start
    python -m tests.demo_training.instruct --out DIR    #  3 min; from base
    python -m tests.demo_training.reward   --out DIR    #  3 min; from instruct
    python -m tests.demo_training.judge    --out DIR    #  5 min; from base
    python -m tests.demo_training.critic   --out DIR    # 13 min; from judge
    python -m tests.demo_training.text     --out DIR    # 25 min
    python -m tests.demo_training.measure  --out DIR    # on held-out pictures

Copy `instruct`, `reward`, `judge`, `critic` and `text` from DIR to stream_engine/demo/checkpoints.
The data is a function of the seed; weights differ in their last bits between machines and versions
of torch.
"""
