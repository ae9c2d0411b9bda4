"""Training of the demo checkpoints. Each script writes one, from a seed, on one core:

    python -m stream_engine.demo.training.base     --out DIR    # 10 min; the truthful start
    python -m stream_engine.demo.training.instruct --out DIR    #  3 min; from base
    python -m stream_engine.demo.training.reward   --out DIR    #  3 min; from instruct
    python -m stream_engine.demo.training.judge    --out DIR    #  5 min; from base
    python -m stream_engine.demo.training.critic   --out DIR    # 13 min; from judge
    python -m stream_engine.demo.training.text     --out DIR    # 25 min
    python -m stream_engine.demo.training.measure  --out DIR    # on held-out pictures

Copy `instruct`, `reward`, `judge`, `critic` and `text` from DIR to demo/checkpoints. The data is a
function of the seed; weights differ in their last bits between machines and versions of torch.
"""
