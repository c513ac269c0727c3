"""How a token is drawn: from the student, and from any other law coupled to the student's proposal.

The coupling is the maximal one: the token is an exact draw from the law, and equals the proposal with probability
1 - TV(law, student), the largest possible. With the teacher for the law it is the acceptance rule of speculative sampling
(Leviathan et al. 2023, arXiv 2211.17192, section 2.3; Chen et al. 2023, arXiv 2302.01318).

Shape letters: B rows, K positions of a block, N selected positions, V vocabulary; `...` is (B,) or (B, K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from switchkd.distributions.noise import Address, Stream, gumbel, uniform

# A function like `gumbel`.
Noise = Callable[[Address, Stream, int], Tensor]


@dataclass(frozen=True)
class Draft:
    """The student's proposals: ids (...), the log-probabilities (..., V) they were drawn from, and the draws' addresses."""

    proposal: Tensor
    student_logp: Tensor
    address: Address

    def rows(self, index: slice) -> Draft:
        """The draft of some of the rows."""
        return Draft(self.proposal[index], self.student_logp[index], self.address.at(index))


def proposal_noise(address: Address, vocabulary_size: int) -> Tensor:
    """The noise (..., V) of the student's draws; it needs no token, so it can be made before the positions are reached."""
    return gumbel(address, Stream.PROPOSAL, vocabulary_size)


def student_proposal(student_logp: Tensor, address: Address, *, greedy: bool, noise: Tensor | None = None) -> Tensor:
    """The student's token at each address: the argmax, or a Gumbel-max draw. Log-probabilities (..., V) in, ids (...) out.

    `noise` is that of `proposal_noise` at these addresses, if it has been made already.
    """
    if greedy:
        return student_logp.argmax(dim=-1)
    noise = proposal_noise(address, student_logp.shape[-1]) if noise is None else noise
    return (student_logp + noise).argmax(dim=-1)


def written_tokens(
    draft: Draft,
    law_logp: Tensor,
    elsewhere: Tensor,
    *,
    greedy: bool,
    keep: Tensor | None = None,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """The token written at each position (...), and where it replaces the proposal, bool (...).

    Where `elsewhere` (...) is False the law is the student's own, and the proposal stands. Where it is True the token is a draw
    from `law_logp` (..., V), coupled to the proposal; greedy, it is the law's argmax.

    `keep` (...) is the uniform that says whether a proposal stands, if it has been made already. `noise`, if given, makes the
    excess draw's for all rows at once, as a graph has to.

    A row of a block (B, K) ends where a proposal is first replaced. Past that place tokens are undefined: what was drafted
    there continued another prefix.
    """
    if greedy:
        token = torch.where(elsewhere, law_logp.argmax(dim=-1), draft.proposal)
        return token, token != draft.proposal
    keep = uniform(draft.address, Stream.KEEP) if keep is None else keep
    replaced = elsewhere & ~_keeps_proposal(draft, law_logp, keep)
    if replaced.ndim > 1:
        # The first one ends its row's block, so the others would be drawn for nothing.
        replaced &= replaced.cumsum(dim=1) == 1
    one_each = replaced if replaced.ndim == 1 else replaced.any(dim=1)
    # A graph draws for every row, since its shapes are fixed. Without one the host is asked which rows need it.
    in_graph = noise is not None or torch.compiler.is_compiling()
    row_N = torch.arange(len(one_each), device=one_each.device) if in_graph else one_each.nonzero()[:, 0]
    token = draft.proposal.clone()
    at = (row_N,) if replaced.ndim == 1 else (row_N, replaced.int().argmax(dim=1)[row_N])
    drawn_N = _excess_draw(draft.student_logp[at], law_logp[at], draft.address.at(at), noise or gumbel)
    token[at] = torch.where(replaced[at], drawn_N, token[at])
    return token, replaced


def _keeps_proposal(draft: Draft, law_logp: Tensor, keep: Tensor) -> Tensor:
    """Where the student's proposal s is kept, bool (...): with probability min(1, law(s) / p_S(s))."""
    at_proposal = draft.proposal.unsqueeze(-1)
    log_ratio = (law_logp.gather(-1, at_proposal) - draft.student_logp.gather(-1, at_proposal)).squeeze(-1)
    return keep.log() < log_ratio


def _excess_draw(student_logp_NV: Tensor, law_logp_NV: Tensor, address: Address, noise: Noise) -> Tensor:
    """Ids (N,) from the normalized excess (law - p_S)+: the tokens where the proposals are not kept."""
    excess = (law_logp_NV.exp() - student_logp_NV.exp()).clamp_(min=0)
    # Rounding may leave no excess at all. The two distributions then differ in their last bits only, so the law itself will do.
    has_excess = excess.sum(dim=-1, keepdim=True) > 0
    noise_NV = noise(address, Stream.EXCESS, excess.shape[-1])
    return (torch.where(has_excess, excess.log(), law_logp_NV) + noise_NV).argmax(dim=-1)
