"""What a batch costs in memory, and the largest that fits: numbers in, numbers out.

All parts but the weights and the reserve follow from two sizes: `rows` of the decode batch and
`prefill_tokens` of one packed forward.

    K            KV bytes a token: 2 * layers * kv_heads * head_dim * itemsize
    slots        one a row, of a whole answer                        rows * slot_tokens * K
    prefixes     the questions in flight, Q = ceil(rows / k), and room for as many again, up to one
                 prefill: those being prefilled, and those of which few rows are left
                                             (Q * prompt + min(Q * prompt, prefill_tokens)) * K
    activations  of one forward of that many tokens; see `LanguageShape.bytes_per_activation`
    workspace    float32 logits [rows, V], what the sampler holds beside them, and a decode step's
                 activations; twice with CUDA graphs

Where not all fits, a prefill may take a quarter of what is available and the rows get the rest: so
more memory never means fewer rows. The module knows no model and no cache, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stream_engine.config import ModelRole, SamplingConfig
from stream_engine.errors import ConfigError

DEFAULT_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Upper bound of tokens in a packed forward, where the user sets none. CPU: GEMMs are near their
peak from some hundred tokens on."""
STEPS_PER_READ = 8
"""Steps of a captured decode between two looks at what was drawn."""
DEFAULT_ROWS = {"cpu": 160, "cuda": 320}
"""Upper bound of rows in a decode step. Accelerator: beyond about 300 rows nothing but launch
latency improves."""
RESERVE = {"cpu": 0.10, "cuda": 0.05}
"""Share of the available memory that no plan touches: fragments, libraries' own buffers."""
FORWARD_SHARE = 0.25
"""Most that one packed forward and the prefixes it fills may take of what is available."""
SUFFIX_PADDING = 2
"""Scoring pads answers of unequal lengths to the longest: about twice their tokens."""
GRAPHS_FACTOR = 2
"""Captured steps of all sizes share one pool; pieces of unequal sizes leave gaps in it."""
PENALTY_COPIES = 3.5
"""Copies of the logits that a repetition penalty makes, and its marks of a byte each."""
SAMPLER_ELEMENTS = 6 << 19
"""float32 numbers in the temporaries of the CPU's sampler, which works on slabs of rows."""


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of a language model, as one rank holds it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    itemsize: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize

    @property
    def bytes_per_activation(self) -> int:
        """Peak bytes of one token in a packed forward without gradients.

        Alive at once: the embeddings, the residual stream, the normed input and the output (4 D),
        and in the widest place of a layer the MLP's gate, up and product (3 I); or query, its
        rotated halves, the attention's output and its packed copy (6 Hq d), key and value (4 Hkv
        d); or the norm's float32 input, square and product (3 D).
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widest = self.itemsize * max(3 * self.intermediate, 6 * query + 4 * key)
        return self.itemsize * 4 * self.hidden + max(widest, 4 * 3 * self.hidden)

    @property
    def bytes_per_suffix(self) -> int:
        """What a token of an answer takes more, when answers are scored over a shared prefix.

        Padded query and output, key and value, and the output over the prefix.
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.itemsize * (SUFFIX_PADDING * (2 * query + 2 * key) + query)


@dataclass(frozen=True)
class Demand:
    """What a plan is asked for. `rows` and `tokens` are upper bounds."""

    shape: LanguageShape
    kv_bytes: int
    """Of one token over all layers: the shape's, or what a real cache holds."""
    rows: int
    """0: the engine only scores, and needs no slots."""
    tokens: int
    slot_tokens: int
    """Tokens a slot must hold: the longest answer."""
    prompt_tokens: int
    """A typical prompt."""
    rows_per_question: int = 1
    logit_copies: float = 1.0
    """float32 tensors [rows, V] alive at once: soft cap and repetition penalty make more."""
    device: str = "cpu"
    grows: bool = True
    """Slabs grow as they are needed, as on CPU, instead of being allocated ahead."""
    graphs: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """The largest batch that fits; sizes of its parts in bytes. See the module header."""

    rows: int
    slot_tokens: int
    prefix_tokens: int
    prefill_tokens: int
    rows_per_question: int
    slots: int
    prefixes: int
    activations: int
    workspace: int
    reserve: int
    available: int
    bottleneck: str
    """What keeps the batch from being larger: "max_rows", or the largest part."""
    weights: int = 0
    """Resident already: no part of `available`."""
    confirmed: bool = False
    """Whether it was tried, not only computed."""

    @property
    def total(self) -> int:
        """Bytes that the plan takes beside the weights."""
        return self.slots + self.prefixes + self.activations + self.workspace + self.reserve

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def line(self) -> str:
        """The plan in one line, for people."""
        parts = f"activations {_size(self.activations + self.workspace)}"
        taken = f"{_size(self.total - self.reserve)} of its {_size(self.available)}"
        prefixes = f"prefixes {self.prefix_tokens} tokens ({_size(self.prefixes)})"
        if not self.rows:
            return f"scores {self.prefill_tokens} tokens at once, {prefixes}, {parts}: {taken}"
        rows = f"{self.rows} rows x {self.slot_tokens} tokens ({_size(self.slots)})"
        limit = f"; limited by {self.bottleneck}"
        if self.rows < self.rows_per_question:
            limit += f", below the {self.rows_per_question} answers of one question"
        return f"{rows}, {prefixes}, {parts}: {taken}{limit}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        return vars(self) | {"total": self.total}


# -- the plan --------------------------------------------------------------------------------------


def plan_memory(demand: Demand, available: int, *, weights: int = 0) -> MemoryPlan:
    """The plan with the most rows within `demand`'s bounds that takes at most `available` bytes.

    Where the rows would not even be those of one question, prefills shrink to one prompt first.

    Raises:
        ConfigError: when not even one row fits, naming the part that takes most.
    """
    plan = _measure(demand, demand.rows, demand.tokens, available)
    if not plan.fits and demand.rows:
        plan = _most_rows(demand, _prefill_tokens(demand, available), available)
        bound = min(demand.rows, demand.rows_per_question)
        if plan.rows < bound or not plan.fits:
            # Capped at one question: more memory must not give fewer rows than less did.
            smallest = min(demand.tokens, demand.prompt_tokens)
            plan = _most_rows(replace(demand, rows=bound), smallest, available)
    elif not plan.fits:
        plan = _most_tokens(demand, available)
    if not plan.fits:
        raise ConfigError(_too_little(plan, demand))
    if (plan.rows, plan.prefill_tokens) != (demand.rows, demand.tokens):
        plan = replace(plan, bottleneck=_largest_part(plan))
    return replace(_with_spare_prefixes(plan, demand), weights=weights)


def wanted_bytes(demand: Demand) -> int:
    """Available bytes from which on more memory would change nothing."""
    largest = _measure(demand, demand.rows, demand.tokens, 0)
    return int(largest.total / (1 - RESERVE.get(demand.device, RESERVE["cuda"]))) + 1


def share_out(available: int, wants: Sequence[int]) -> list[int]:
    """Parts of `available`: who wants less than an equal share gets that, others share the rest.

    What nobody wants is divided equally.
    """
    parts = [0] * len(wants)
    left = available
    order = sorted(range(len(wants)), key=lambda place: wants[place])
    for served, place in enumerate(order):
        parts[place] = min(wants[place], left // (len(wants) - served))
        left -= parts[place]
    return [part + left // len(wants) for part in parts]


def _activation_bytes(demand: Demand) -> int:
    return demand.shape.bytes_per_activation + demand.shape.bytes_per_suffix


def _prefill_tokens(demand: Demand, available: int) -> int:
    """Tokens of a forward that, with the prefixes it fills, stays within its share."""
    affordable = int(FORWARD_SHARE * available) // (_activation_bytes(demand) + demand.kv_bytes)
    return min(demand.tokens, max(demand.prompt_tokens, affordable))


def _most_rows(demand: Demand, tokens: int, available: int) -> MemoryPlan:
    return _largest(lambda rows: _measure(demand, rows, tokens, available), 1, demand.rows)


def _most_tokens(demand: Demand, available: int) -> MemoryPlan:
    smallest = min(demand.tokens, demand.prompt_tokens)
    return _largest(lambda tokens: _measure(demand, 0, tokens, available), smallest, demand.tokens)


def _largest(measure: Callable[[int], MemoryPlan], low: int, high: int) -> MemoryPlan:
    """The plan of the largest size that fits, or of `low` where none does.

    By bisection, since every part grows with the size.
    """
    too_many = high + 1
    while too_many - low > 1:
        middle = (low + too_many) // 2
        if measure(middle).fits:
            low = middle
        else:
            too_many = middle
    return measure(low)


def _measure(demand: Demand, rows: int, tokens: int, available: int) -> MemoryPlan:
    """The parts of a plan of that size, whether it fits or not."""
    shape = demand.shape
    slots = grown_slots(rows) if demand.grows else rows + 1
    slot_tokens = grown_slot_tokens(demand.slot_tokens) if demand.grows else demand.slot_tokens
    if rows:
        in_flight = -(-rows // demand.rows_per_question) * demand.prompt_tokens
        prefix_tokens = in_flight + min(in_flight, tokens)
    else:
        slots = 0
        prefix_tokens = max(tokens // 2, demand.prompt_tokens)
    logits = int(4 * rows * shape.vocab * demand.logit_copies)
    steps = logits + rows * shape.bytes_per_activation
    if demand.graphs:
        steps *= GRAPHS_FACTOR
    if demand.device == "cpu":
        steps += 4 * min(2 * rows * shape.vocab, SAMPLER_ELEMENTS)
    return MemoryPlan(
        rows=rows,
        slot_tokens=demand.slot_tokens,
        prefix_tokens=prefix_tokens,
        prefill_tokens=tokens,
        rows_per_question=demand.rows_per_question,
        slots=slots * slot_tokens * demand.kv_bytes,
        prefixes=prefix_tokens * demand.kv_bytes,
        activations=max(tokens, demand.prompt_tokens) * _activation_bytes(demand),
        workspace=steps,
        reserve=int(RESERVE.get(demand.device, RESERVE["cuda"]) * available),
        available=available,
        bottleneck="max_rows",
    )


def _with_spare_prefixes(plan: MemoryPlan, demand: Demand) -> MemoryPlan:
    """Where slabs grow, what is left may serve prefixes: a limit that costs nothing unused."""
    if not demand.grows:
        return plan
    spare = (plan.available - plan.total) // max(1, demand.kv_bytes)
    most = max(plan.rows, 1) * demand.prompt_tokens + plan.prefill_tokens
    more = max(0, min(spare, most - plan.prefix_tokens))
    return replace(
        plan,
        prefix_tokens=plan.prefix_tokens + more,
        prefixes=plan.prefixes + more * demand.kv_bytes,
    )


def _largest_part(plan: MemoryPlan) -> str:
    return max(("slots", "prefixes", "activations", "workspace"), key=lambda p: getattr(plan, p))


def _too_little(plan: MemoryPlan, demand: Demand) -> str:
    part = _largest_part(plan)
    shorter = f"give less than --max_new_tokens {demand.slot_tokens}, or " if demand.rows else ""
    what = f"one answer of {demand.slot_tokens} tokens" if demand.rows else "scoring one answer"
    return (
        f"{what} to a prompt of {demand.prompt_tokens} tokens needs {_size(plan.total)} beside the "
        f"weights, {_size(plan.available)} are free; {part} take most "
        f"({_size(getattr(plan, part))}): {shorter}make room with --placement staged, "
        "--tensor_parallel, --offload or fewer workers"
    )


def grown_slots(rows: int) -> int:
    """Slots that a growing cache has once `rows` are in use; see `KVCache.allocate_slot`."""
    slots = 0
    while slots < rows:
        slots += max(8, slots // 2)
    return slots


def grown_slot_tokens(tokens: int) -> int:
    """Capacity of a slot that grew token by token; see `KVCache.reserve_slot_tokens`."""
    capacity = 0
    while capacity < tokens:
        capacity = max(32, capacity + 1, min(2 * capacity, capacity + 1 + 256))
    return capacity


# -- what is there ---------------------------------------------------------------------------------


def language_shape(
    stated: Any, *, itemsize: int, vocab: int = 0, hidden: int = 0, parts: int = 1
) -> LanguageShape:
    """Sizes by the names that transformers' configurations use; `parts` ranks share the heads.

    `vocab` and `hidden`, where given, are known from the weights. Sizes that `stated` leaves out
    are guessed high rather than low, but for the layers: 0 then.
    """

    def size(*names: str, default: int) -> int:
        values = (getattr(stated, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), default)

    hidden = hidden or size("hidden_size", "n_embd", "d_model", default=0)
    heads = size("num_attention_heads", "n_head", default=max(1, hidden // 64))
    experts = size("num_experts_per_tok", default=0) * size("moe_intermediate_size", default=0)
    inner = max(size("intermediate_size", "n_inner", default=4 * hidden), experts)
    return LanguageShape(
        layers=size("num_hidden_layers", "n_layer", default=0),
        hidden=hidden,
        intermediate=inner // parts,
        heads=max(1, heads // parts),
        kv_heads=max(1, size("num_key_value_heads", default=heads) // parts),
        head_dim=size("head_dim", default=hidden // heads),
        vocab=vocab or size("vocab_size", default=0),
        itemsize=itemsize,
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def rows_per_question(role: ModelRole, sampling: SamplingConfig) -> int:
    """Answers that share a prompt: those to a sample; of a judge's replies, one is safe to say."""
    return sampling.sample_k if role.stage == "rollouts" else 1
