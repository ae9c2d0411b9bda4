"""Preference losses by the names that TRL gives them, in plain torch: TRL itself is not needed.

Formulas are those of TRL's `DPOTrainer` (1.16), whose own code they are tested against; the papers
stand at each. A loss gives one value a pair. B: pairs of a batch, T: tokens of the longest answer.

    ratio = log p(answer) - log p_reference(answer), summed over the answer's tokens
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stream_engine.errors import ConfigError
from stream_engine.text import nearest

DISCOPOP_TAU = 0.05
"""TRL's default of `discopop_tau`."""


class LossSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which loss, and the numbers in it. The defaults are TRL's, but for `rpo_alpha`."""

    loss: str = "sigmoid"
    """One of LOSSES."""
    beta: float = 0.1
    label_smoothing: float = 0.0
    """The share of pairs that are presumed wrong, for robust and exo_pair (which needs some)."""
    rpo_alpha: float = 1.0
    """Weight of the likelihood of the chosen answer (TRL's loss `sft`) beside the loss; 0: none."""


class Ratios(NamedTuple):
    """What a loss is computed from, each [B]."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    """Number of the answer's tokens, the end token included."""
    rejected_tokens: Tensor
    ref_chosen: Tensor
    """Log-prob of the answer under the reference model."""
    ref_rejected: Tensor

    @property
    def difference(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def difference_of_means(self) -> Tensor:
        """Of the ratios per token."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


Loss = Callable[[Ratios, LossSettings], Tensor]


def sigmoid(ratios: Ratios, settings: LossSettings) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7)."""
    return -logsigmoid(settings.beta * ratios.difference)


def sigmoid_norm(ratios: Ratios, settings: LossSettings) -> Tensor:
    """The same of ratios per token (Lambert et al. 2024, Tulu 3)."""
    return -logsigmoid(settings.beta * ratios.difference_of_means)


def hinge(ratios: Ratios, settings: LossSettings) -> Tensor:
    """SLiC (Zhao et al. 2023), with DPO's reward (Liu et al. 2024, RSO)."""
    return torch.relu(1 - settings.beta * ratios.difference)


def ipo(ratios: Ratios, settings: LossSettings) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17), of ratios per token, as its authors ran it."""
    return (ratios.difference_of_means - 1 / (2 * settings.beta)) ** 2


def exo_pair(ratios: Ratios, settings: LossSettings) -> Tensor:
    """EXO for pairs (Ji et al. 2024, eq. 16)."""
    error = torch.tensor(settings.label_smoothing)
    logits = settings.beta * ratios.difference
    won, lost = logsigmoid(logits), logsigmoid(-logits)
    return won.exp() * (won - torch.log1p(-error)) + lost.exp() * (lost - torch.log(error))


def nca_pair(ratios: Ratios, settings: LossSettings) -> Tensor:
    """NCA for pairs (Chen et al. 2024)."""
    chosen, rejected = settings.beta * ratios.chosen, settings.beta * ratios.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(ratios: Ratios, settings: LossSettings) -> Tensor:
    """Robust DPO: a share of the labels is wrong (Chowdhury et al. 2024)."""
    error, logits = settings.label_smoothing, settings.beta * ratios.difference
    clean, flipped = -(1 - error) * logsigmoid(logits), -error * logsigmoid(-logits)
    return (clean - flipped) / (1 - 2 * error)


def bco_pair(ratios: Ratios, settings: LossSettings) -> Tensor:
    """BCO for pairs, without its shift (Jung et al. 2024)."""
    return -logsigmoid(settings.beta * ratios.chosen) - logsigmoid(-settings.beta * ratios.rejected)


def sppo_hard(ratios: Ratios, settings: LossSettings) -> Tensor:
    """SPPO with certain verdicts (Wu et al. 2024, eq. 4.7)."""
    return (ratios.chosen - 0.5 / settings.beta) ** 2 + (ratios.rejected + 0.5 / settings.beta) ** 2


def aot(ratios: Ratios, settings: LossSettings) -> Tensor:
    """AOT of paired data (Melnyk et al. 2024): sorted differences of the batch."""
    ref = ratios.ref_chosen - ratios.ref_rejected
    return smoothed(torch.sort(ratios.difference + ref)[0] - torch.sort(ref)[0], settings)


def aot_unpaired(ratios: Ratios, settings: LossSettings) -> Tensor:
    """AOT of unpaired data: the sorted chosen against the sorted rejected."""
    return smoothed(torch.sort(ratios.chosen)[0] - torch.sort(ratios.rejected)[0], settings)


def smoothed(difference: Tensor, settings: LossSettings) -> Tensor:
    """DPO's loss with a share of the labels turned around."""
    error, logits = settings.label_smoothing, settings.beta * difference
    return -(1 - error) * logsigmoid(logits) - error * logsigmoid(-logits)


def apo_zero(ratios: Ratios, settings: LossSettings) -> Tensor:
    """APO (D'Oosterlinck et al. 2024, eq. 7): up with the chosen, down with the rejected."""
    chosen, rejected = settings.beta * ratios.chosen, settings.beta * ratios.rejected
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(ratios: Ratios, settings: LossSettings) -> Tensor:
    """APO (eq. 8): down with both, more with the rejected."""
    chosen, logits = settings.beta * ratios.chosen, settings.beta * ratios.difference
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(logits)


def discopop(ratios: Ratios, settings: LossSettings) -> Tensor:
    """DiscoPOP (Lu et al. 2024, eq. 5)."""
    logits = settings.beta * ratios.difference
    share = torch.sigmoid(logits / DISCOPOP_TAU)
    return -logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


def nothing(ratios: Ratios, _: LossSettings) -> Tensor:
    """No preference: with `rpo_alpha` the chosen answers are imitated, and no more."""
    return 0 * ratios.chosen


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": nothing,
}


def check_loss(settings: LossSettings) -> None:
    """Raise ConfigError for an unknown loss, or numbers that it does not take."""
    if settings.loss not in LOSSES:
        raise ConfigError(
            f"unknown loss {settings.loss!r}{nearest(settings.loss, [*LOSSES])}; "
            f"choose from {', '.join(LOSSES)}"
        )
    error = settings.label_smoothing
    if not 0 <= error < 0.5 or (settings.loss == "exo_pair" and error == 0):
        least = "above 0" if settings.loss == "exo_pair" else "at least 0"
        raise ConfigError(f"label_smoothing must be {least} and below 0.5, it is {error}")
    if settings.loss == "sft" and settings.rpo_alpha <= 0:
        raise ConfigError("the loss sft alone is rpo_alpha times itself: give an rpo_alpha above 0")


def ratios_of(token_logps: Tensor, ref_logps: Tensor, is_answer: Tensor) -> Ratios:
    """Of rows that are chosen and rejected in turn.

    Args:
        token_logps: [2 B, T] of the model, 0 where not `is_answer`.
        ref_logps: [2 B], the reference model's sums.
    """
    of_rows = token_logps.sum(1) - ref_logps
    tokens = is_answer.sum(1)
    return Ratios(
        *(of_rows[0::2], of_rows[1::2]),
        *(tokens[0::2], tokens[1::2]),
        *(ref_logps[0::2], ref_logps[1::2]),
    )


def preference_loss(
    token_logps: Tensor, ref_logps: Tensor, is_answer: Tensor, settings: LossSettings
) -> Tensor:
    """The mean loss of rows as `ratios_of` takes them, and what `rpo_alpha` weighs."""
    ratios = ratios_of(token_logps, ref_logps, is_answer)
    preference = LOSSES[settings.loss](ratios, settings).mean()
    likelihood = token_logps[0::2].sum() / is_answer[0::2].sum()
    return preference - settings.rpo_alpha * likelihood
