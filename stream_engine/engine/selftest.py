"""What is checked of every model right after loading, on a dozen random tokens.

Future leak: cutting the end of a sequence must not change what stands before. (A configuration
object shared between two models can silently switch a language model to bidirectional attention.)
Shared prefix: prefill + extension + decoding through the cache must give what transformers' own
attention gives for the whole sequence, and a question about a picture must give through the cache
what the model's own code gives. In half precision rounding hides it there when image tokens see
each other in both directions, so the masks of the model's own code are looked at as well. A model
that fails this, or never calls the engine's attention, is run through the plain path.
Plain path: tokens after a prompt must give through the model's own cache what the whole sequence
gives; there is no other way to run a model that fails this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from stream_kernels import HostLayout
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stream_engine.engine.attention_steps import (
    ATTENTION_NAME,
    DecodeStep,
    ExtendStep,
    PrefillStep,
    UnsupportedAttentionError,
    active,
)
from stream_engine.engine.plain import plain_states
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models.base import Prompt, VisionLanguageModel
from stream_engine.models.native import naming_architecture

if TYPE_CHECKING:
    from stream_engine.engine.runner import ModelRunner

# Largest difference of hidden states, relative to their largest entry, that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PREFIX, SUFFIX = 9, 4
PROBE_NAME = "stream_engine_probe"


@torch.no_grad()
def check_model(runner: ModelRunner) -> dict[str, float | str]:
    """Run the checks; clears `model.shares_prefix` when the second fails, and runs the third then.

    Raises:
        CheckpointError: when the model sees the future, computes NaN or infinity, loses its prompt
            on the plain path, or cannot be run at all.
    """
    with naming_architecture(runner.model.checkpoint, runner.model.backbone):
        return _check_model(runner)


def _check_model(runner: ModelRunner) -> dict[str, float | str]:
    model = runner.model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (PREFIX + SUFFIX,), generator=generator)
    positions = torch.arange(PREFIX + SUFFIX, device=model.device)
    embeds = model.embed(ids.to(model.device))
    model.set_attention(model.own_attention)
    whole = model.forward(embeds, positions)
    cut = model.forward(embeds[:PREFIX], positions[:PREFIX])
    model.set_attention(ATTENTION_NAME)
    if not torch.isfinite(whole).all():
        is_exact = model.dtype == torch.float32
        remedy = "its weights are damaged" if is_exact else "try --dtype float32"
        raise CheckpointError(
            f"{model.checkpoint} computes NaN or infinity in {model.dtype}; {remedy}"
        )
    tolerance = TOLERANCE.get(model.dtype, 1e-4)
    leak = _difference(cut, whole[:PREFIX])
    if leak > tolerance:
        raise CheckpointError(
            f"{model.checkpoint} sees future tokens: cutting the end of a sequence changed its "
            f"start by {leak:.2g} (relative); its language model is not causal as loaded"
        )
    report: dict[str, float | str] = {"future_leak": leak}
    if model.shares_prefix:
        try:
            prefix = picture = _difference(_through_cache(runner, embeds, positions), whole)
            report["shared_prefix"] = prefix
            if (prompt := _pictured(model)) is not None:
                report["shared_picture"] = picture = _difference_with_picture(runner, prompt)
                if _sees_ahead(model, prompt):
                    raise UnsupportedAttentionError("tokens of a picture see later ones")
        except UnsupportedAttentionError as error:
            report["unsupported"] = str(error)
            model.shares_prefix = False
        else:
            model.shares_prefix = max(prefix, picture) <= tolerance
    if not model.shares_prefix:
        model.set_attention(model.own_attention)
        report["plain"] = _check_plain(runner)
    return report


def _through_cache(runner: ModelRunner, embeds: Tensor, positions: Tensor) -> Tensor:
    """The same hidden states by way of prefill, extension and one decode step."""
    model, cache = runner.model, runner.cache
    span = (cache.allocate_span(PREFIX), PREFIX)
    slot = cache.allocate_slot()
    cache.reserve_slot_tokens(SUFFIX)
    with active(PrefillStep(cache, [span])):
        parts = [model.forward(embeds[:PREFIX], positions[:PREFIX])]
    if PREFIX and not cache.layers:
        raise UnsupportedAttentionError("the model never calls the registered attention")
    with active(ExtendStep(cache, [(span, [SUFFIX - 1])], slots=[slot])):
        parts.append(model.forward(embeds[PREFIX:-1], positions[PREFIX:-1]))
    host = HostLayout(spans=[span], groups=[[0]], slots=[slot], suffix_lengths=[SUFFIX])
    with active(DecodeStep.from_host(cache, host, model.device)):
        parts.append(model.forward(embeds[-1:], positions[-1:]))
    cache.release_slot(slot)
    cache.release_span(*span)
    return torch.cat(parts)


def _pictured(model: VisionLanguageModel) -> Prompt | None:
    """A question about a picture; None for models that take no pictures."""
    picture = Image.radial_gradient("L").resize((96, 64)).convert("RGB")
    try:
        return model.prompt("What is this?", [picture])
    except RecordError:
        return None


def _difference_with_picture(runner: ModelRunner, prompt: Prompt) -> float:
    """Cache against the model's own code, for a question about a picture and tokens after it."""
    model, cache = runner.model, runner.cache
    ids = list(range(1, SUFFIX))
    span = (cache.allocate_span(len(prompt)), len(prompt))
    with active(PrefillStep(cache, [span])):
        last = model.prefill([prompt], model.encode_images([prompt]))
    start = prompt.next_position
    positions = torch.arange(start, start + len(ids), device=model.device)
    with active(ExtendStep(cache, [(span, [len(ids)])])):
        hidden = model.forward(model.embed(torch.tensor(ids, device=model.device)), positions)
    cache.release_span(*span)
    model.set_attention(model.own_attention)
    whole = plain_states(runner, prompt, ids)
    model.set_attention(ATTENTION_NAME)
    return _difference(torch.cat([last, hidden]), whole)


def _check_plain(runner: ModelRunner) -> float:
    """Tokens after a prompt, over the model's own cache, against the whole sequence at once.

    A router of experts may choose otherwise after a rounding, so that in half precision only a
    difference like that of a lost prompt counts.

    Raises:
        CheckpointError: when they differ, because the cache does not carry the prompt on.
    """
    model = runner.model
    prompt, ids = model.prompt("What is this?", []), list(range(1, SUFFIX + 1))
    embeds = model.embed(torch.tensor([*prompt.ids, *ids], device=model.device))
    positions = torch.arange(len(embeds), device=model.device)
    whole = model.forward(embeds, positions)[-SUFFIX:]
    difference = _difference(plain_states(runner, prompt, ids)[1:], whole)
    allowed = TOLERANCE.get(model.dtype, 1e-4)
    if model.dtype != torch.float32:
        alone = model.forward(embeds[-SUFFIX:], positions[-SUFFIX:])
        allowed = max(allowed, _difference(alone, whole) / 2)
    if difference > allowed:
        raise CheckpointError(
            f"{model.checkpoint}: {type(model.backbone).__name__} does not go on from its prompt: "
            f"hidden states after it differ from those of the whole sequence by {difference:.2g} "
            f"(relative); this architecture is not supported"
        )
    return difference


def _sees_ahead(model: VisionLanguageModel, prompt: Prompt) -> bool:
    """Whether the model's own code lets any token of a prompt see one that comes after it."""
    seen: list[bool] = []

    def probe(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is None:  # sdpa then asks the call, and after it the module
            is_causal = kwargs.get("is_causal")
            seen.append(
                not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
            )
        else:
            seen.append(bool(_allowed(attention_mask).triu(1).any()))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(PROBE_NAME, probe)
    AttentionMaskInterface.register(PROBE_NAME, sdpa_mask)
    model.set_attention(PROBE_NAME)
    model.prefill([prompt], model.encode_images([prompt]))
    model.set_attention(ATTENTION_NAME)
    return any(seen)


def _allowed(mask: Tensor) -> Tensor:
    """Where an attention mask, boolean or added to the scores, lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, relative to the largest entry of `b`."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-9)).item()
