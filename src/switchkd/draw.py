"""How a token is drawn from the student, and from the teacher coupled to the student's proposal.

The coupling is the maximal one: the teacher's token is an exact draw from the teacher, and equals the proposal with
probability 1 - TV(teacher, student), as often as any rule can make it (the acceptance rule of speculative sampling:
Leviathan et al. 2023, arXiv 2211.17192, section 2.3; Chen et al. 2023, arXiv 2302.01318).
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchkd.noise import Address, Stream, gumbel, uniform


def student_proposal(student_logp: Tensor, address: Address, *, greedy: bool) -> Tensor:
    """The student's token at each address: argmax, or a Gumbel-max draw. Log-probs (..., V) in, ids (...) out."""
    if greedy:
        return student_logp.argmax(dim=-1)
    return (student_logp + gumbel(address, Stream.PROPOSAL, student_logp.shape[-1])).argmax(dim=-1)


def teacher_token(
    proposal: Tensor, student_logp: Tensor, teacher_logp: Tensor, address: Address, *, greedy: bool
) -> Tensor:
    """A draw from the teacher, coupled to the student's `proposal`. Log-probs (B, V) and ids (B,) in, ids (B,) out.

    The proposal s is kept with probability min(1, p_T(s) / p_S(s)); otherwise the token is drawn from the normalised
    excess (p_T - p_S)+. Greedy: the teacher's argmax.
    """
    if greedy:
        return teacher_logp.argmax(dim=-1)
    log_ratio = (teacher_logp - student_logp).gather(-1, proposal.unsqueeze(-1)).squeeze(-1)
    replaced = uniform(address, Stream.KEEP).log() >= log_ratio
    if not bool(replaced.any()):
        return proposal
    excess = (teacher_logp[replaced].exp() - student_logp[replaced].exp()).clamp_(min=0)
    noise = gumbel(address.at(replaced), Stream.EXCESS, excess.shape[-1])
    drawn = (excess.log() + noise).argmax(dim=-1)
    token = proposal.clone()
    # Rounding can leave no excess where the two distributions are equal but for the last bit: then nothing is replaced.
    token[replaced] = torch.where(excess.sum(dim=-1) > 0, drawn, proposal[replaced])
    return token
