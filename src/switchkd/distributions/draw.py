"""How a token is drawn from the student, and from the teacher coupled to the student's proposal.

The coupling is the maximal one: the teacher's token is an exact draw from the teacher, and equals the proposal with
probability 1 - TV(teacher, student), as often as any rule can make it (the acceptance rule of speculative sampling:
Leviathan et al. 2023, arXiv 2211.17192, section 2.3; Chen et al. 2023, arXiv 2302.01318).
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchkd.distributions.noise import Address, Stream, gumbel, uniform


def proposal_noise(address: Address, vocabulary_size: int) -> Tensor:
    """The noise of the student's draws, the address's shape + (V,): it can be made before the positions are reached."""
    return gumbel(address, Stream.PROPOSAL, vocabulary_size)


def student_proposal(student_logp: Tensor, address: Address, *, greedy: bool, noise: Tensor | None = None) -> Tensor:
    """The student's token at each address: argmax, or a Gumbel-max draw. Log-probs (..., V) in, ids (...) out.

    `noise` is that of `proposal_noise` at these addresses, where it has been made before.
    """
    if greedy:
        return student_logp.argmax(dim=-1)
    noise = proposal_noise(address, student_logp.shape[-1]) if noise is None else noise
    return (student_logp + noise).argmax(dim=-1)


def keeps_proposal(
    proposal: Tensor, student_logp: Tensor, teacher_logp: Tensor, address: Address, *, greedy: bool
) -> Tensor:
    """Where the teacher, writing, keeps the student's proposal s: with probability min(1, p_T(s) / p_S(s)).

    Log-probs (..., V) and ids (...) in, bool (...) out. Greedy: where the proposal is the teacher's argmax.
    """
    if greedy:
        return teacher_logp.argmax(dim=-1) == proposal
    at_proposal = proposal.unsqueeze(-1)
    log_ratio = (teacher_logp.gather(-1, at_proposal) - student_logp.gather(-1, at_proposal)).squeeze(-1)
    return uniform(address, Stream.KEEP).log() < log_ratio


def replacement(student_logp: Tensor, teacher_logp: Tensor, address: Address, *, greedy: bool) -> Tensor:
    """The teacher's token where it does not keep the proposal: a draw from the normalised excess (p_T - p_S)+.

    Log-probs (N, V) in, ids (N,) out. Greedy: the teacher's argmax. Where rounding leaves no excess at all, the two
    distributions are equal but for their last bits, and the teacher's own is drawn from.
    """
    if greedy:
        return teacher_logp.argmax(dim=-1)
    excess = (teacher_logp.exp() - student_logp.exp()).clamp_(min=0)
    has_excess = excess.sum(dim=-1, keepdim=True) > 0
    noise = gumbel(address, Stream.EXCESS, excess.shape[-1])
    return (torch.where(has_excess, excess.log(), teacher_logp) + noise).argmax(dim=-1)


def independent_token(teacher_logp: Tensor, address: Address, *, greedy: bool) -> Tensor:
    """A draw from the teacher, independent of the proposal. Log-probs (..., V) in, ids (...) out. Greedy: the argmax.

    It has the noise of `replacement`: no position makes both draws.
    """
    if greedy:
        return teacher_logp.argmax(dim=-1)
    return (teacher_logp + gumbel(address, Stream.EXCESS, teacher_logp.shape[-1])).argmax(dim=-1)


def teacher_token(
    proposal: Tensor, student_logp: Tensor, teacher_logp: Tensor, address: Address, *, greedy: bool
) -> Tensor:
    """An exact draw from the teacher, coupled to the student's proposal. Log-probs (B, V), ids (B,) in, ids (B,) out."""
    replaced = ~keeps_proposal(proposal, student_logp, teacher_logp, address, greedy=greedy)
    token = proposal.clone()
    token[replaced] = replacement(student_logp[replaced], teacher_logp[replaced], address.at(replaced), greedy=greedy)
    return token
