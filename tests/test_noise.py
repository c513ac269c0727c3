"""Noise with an address: a pure function, uniform, independent between addresses; and the shaping of distributions.

Statistical tests run on fixed addresses, so each passes or fails for good; `ALPHA` is the chance that a perfect source
of randomness would have failed one when it was written.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from reference.sampling import shaped
from switchkd.distributions import noise
from switchkd.distributions.noise import Address, Stream, gumbel, row_keys, uniform, uniforms
from switchkd.distributions.shaping import shaped_logp
from switchkd.records import Prompt, Sampling

ALPHA = 1e-4


def addresses(prompt_ids: range, positions: range, *, seed: int = 0, sample_id: int = 0) -> Address:
    """All pairs of prompt and position, shape (prompts, positions)."""
    key = row_keys(seed, [Prompt((1,), prompt_id, sample_id) for prompt_id in prompt_ids])
    shape = len(prompt_ids), len(positions)
    return Address(key[:, None].expand(shape), torch.tensor(positions).expand(shape))


def seed_addresses(count: int) -> Address:
    """The first position of one prompt under many seeds."""
    key = torch.cat([row_keys(seed, [Prompt((1,), 0)]) for seed in range(count)])
    return Address(key, torch.zeros_like(key))


def uniforms_of(gumbel_noise: torch.Tensor) -> torch.Tensor:
    """The uniforms that Gumbel noise was made from, in float64."""
    return -torch.expm1(-torch.exp(-gumbel_noise.double()))


# ------ purity


@pytest.mark.parametrize("stream", list(Stream))
def test_noise_is_the_same_whatever_else_is_in_the_batch(stream: Stream) -> None:
    grid = addresses(range(5), range(7))
    noise_BTV, uniform_BT = gumbel(grid, stream, 11), uniform(grid, stream)
    for row, column in itertools.product(range(5), range(7)):
        alone = addresses(range(row, row + 1), range(column, column + 1))
        assert torch.equal(gumbel(alone, stream, 11)[0, 0], noise_BTV[row, column])
        assert torch.equal(uniform(alone, stream)[0, 0], uniform_BT[row, column])
    shuffled = torch.tensor([3, 0, 4, 1])
    assert torch.equal(gumbel(grid.at(shuffled), stream, 11), noise_BTV[shuffled])
    some = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(gumbel(grid.at(some), stream, 11), noise_BTV[some])
    assert torch.equal(uniform(grid.at(some), stream), uniform_BT[some])


def test_uniforms_of_several_streams_are_those_of_each() -> None:
    grid = addresses(range(5), range(7))
    for found, stream in zip(uniforms(grid, *Stream), Stream, strict=True):
        assert torch.equal(found, uniform(grid, stream))


def test_noise_of_a_token_does_not_depend_on_the_size_of_the_vocabulary() -> None:
    grid = addresses(range(3), range(3))
    assert torch.equal(gumbel(grid, Stream.PROPOSAL, 100)[..., :50], gumbel(grid, Stream.PROPOSAL, 50))


def test_shapes_and_dtype() -> None:
    grid = addresses(range(3), range(4))
    assert gumbel(grid, Stream.EXCESS, 9).shape == (3, 4, 9)
    assert uniform(grid, Stream.KEEP).shape == (3, 4)
    assert gumbel(grid, Stream.EXCESS, 9).dtype == uniform(grid, Stream.KEEP).dtype == torch.float32


def test_every_part_of_the_address_changes_every_draw() -> None:
    one = gumbel(addresses(range(5, 6), range(3, 4)), Stream.PROPOSAL, 64)
    others = {
        "seed": gumbel(addresses(range(5, 6), range(3, 4), seed=1), Stream.PROPOSAL, 64),
        "prompt": gumbel(addresses(range(6, 7), range(3, 4)), Stream.PROPOSAL, 64),
        "sample": gumbel(addresses(range(5, 6), range(3, 4), sample_id=1), Stream.PROPOSAL, 64),
        "position": gumbel(addresses(range(5, 6), range(4, 5)), Stream.PROPOSAL, 64),
        "stream": gumbel(addresses(range(5, 6), range(3, 4)), Stream.EXCESS, 64),
    }
    for part, other in others.items():
        assert not (one == other).any(), part


def test_the_last_position_of_one_stream_is_not_another_stream() -> None:
    """Position and stream share one counter: neighbors in it must not be confused."""
    grid = addresses(range(1), range(50))
    draws = torch.cat([gumbel(grid, stream, 8).reshape(-1, 8) for stream in Stream])
    assert len(draws.unique(dim=0)) == len(draws)


# ------ keys


def test_keys_do_not_collide() -> None:
    # Two of 300,000 keys of 62 bits coincide by chance with probability 1e-8. The ids include small, equal and swapped ones.
    keys = [
        row_keys(
            seed, [Prompt((1,), prompt_id, sample_id) for prompt_id in range(-500, 500) for sample_id in range(60)]
        )
        for seed in (-1, 0, 1, 2, 10)
    ]
    together = torch.cat(keys)
    assert len(together) == 300_000
    assert len(together.unique()) == len(together)
    assert together.min() >= 0
    assert together.max() < 1 << 62


@pytest.mark.parametrize("extreme", [-1, -(1 << 63), (1 << 63) - 1, 1 << 40, (1 << 64) - 2, -12345])
def test_negative_and_huge_seeds_and_ids_are_addresses_like_any_other(extreme: int) -> None:
    keys = [
        row_keys(extreme, [Prompt((1,), 0)]),
        row_keys(0, [Prompt((1,), extreme)]),
        row_keys(0, [Prompt((1,), 0, extreme)]),
        row_keys(0, [Prompt((1,), 0)]),
    ]
    assert len(set(map(int, keys))) == 4
    for key in keys:
        draws = gumbel(Address(key, torch.zeros_like(key)), Stream.PROPOSAL, 1000)
        assert draws.isfinite().all()
        assert stats.kstest(uniforms_of(draws)[0], "uniform").pvalue > ALPHA


# ------ laws

# Every axis along which a run draws, with 65,536 draws each.
AXES = {
    "prompts": lambda: uniform(addresses(range(65_536), range(1)), Stream.KEEP),
    "positions": lambda: uniform(addresses(range(1), range(65_536)), Stream.KEEP),
    "coins": lambda: uniform(addresses(range(256), range(256)), Stream.COIN),
    "vocabulary": lambda: uniforms_of(gumbel(addresses(range(1), range(1)), Stream.PROPOSAL, 65_536)),
    "all": lambda: uniforms_of(gumbel(addresses(range(32), range(32)), Stream.EXCESS, 64)),
    "seeds": lambda: uniform(seed_addresses(65_536), Stream.KEEP),
}


@pytest.mark.parametrize("axis", AXES)
def test_uniforms_are_uniform(axis: str) -> None:
    draws = AXES[axis]().double().flatten()
    assert len(draws) == 65_536
    assert stats.kstest(draws, "uniform").pvalue > ALPHA
    assert stats.chisquare(torch.histc(draws, 256, 0, 1)).pvalue > ALPHA


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("lag", [1, 2, 4, 64])
def test_neighbors_are_independent(axis: str, lag: int) -> None:
    draws = AXES[axis]().double().flatten()
    assert independent(draws[:-lag], draws[lag:])


@pytest.mark.parametrize("pair", list(itertools.combinations(Stream, 2)), ids=str)
def test_streams_of_one_position_are_independent(pair: tuple[Stream, Stream]) -> None:
    grid = addresses(range(256), range(256))
    assert independent(*(uniform(grid, stream).double().flatten() for stream in pair))


@pytest.mark.parametrize("first", [0, 1, 37])
def test_the_noise_of_a_token_is_independent_of_the_uniform_at_its_position(first: int) -> None:
    """Counter 0 of a uniform's stream and counter 0 of the Gumbel noise beside it must not be one draw."""
    grid = addresses(range(256), range(256))
    proposal = uniforms_of(gumbel(grid, Stream.PROPOSAL, first + 1)[..., first]).flatten()
    assert independent(proposal, uniform(grid, Stream.KEEP).double().flatten())


def independent(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether pairs of uniforms fill the unit square evenly, and their correlation is 0, at `ALPHA` each."""
    cells = (first * 16).long().clamp(max=15) * 16 + (second * 16).long().clamp(max=15)
    even = stats.chisquare(torch.bincount(cells, minlength=256)).pvalue > ALPHA
    return even and stats.pearsonr(first, second).pvalue > ALPHA


@pytest.mark.parametrize("along", ["positions", "prompts"])
def test_the_argmax_of_log_p_and_noise_is_a_draw_from_p(along: str) -> None:
    p = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.0099, 0.0001])
    count = 200_000
    grid = addresses(range(1), range(count)) if along == "positions" else addresses(range(count), range(1))
    tokens = (p.log() + gumbel(grid, Stream.PROPOSAL, len(p))).argmax(dim=-1).flatten()
    assert stats.chisquare(torch.bincount(tokens, minlength=len(p)), p.double() * count).pvalue > ALPHA


def test_a_uniform_distribution_over_a_large_vocabulary_is_drawn_evenly() -> None:
    tokens = gumbel(addresses(range(40), range(100)), Stream.PROPOSAL, 3200).argmax(dim=-1).flatten()
    assert stats.chisquare(torch.bincount(tokens // 32, minlength=100)).pvalue > ALPHA


def test_noise_is_finite_over_many_draws() -> None:
    draws = gumbel(addresses(range(64), range(64)), Stream.PROPOSAL, 1024)
    assert draws.isfinite().all()
    keep = uniform(addresses(range(1024), range(1024)), Stream.KEEP)
    assert 0 < keep.min() < 1e-5
    assert 1 - 1e-5 < keep.max() < 1
    assert keep.log().isfinite().all()


@pytest.mark.parametrize("bits", [0, -1], ids=["smallest", "largest"])
def test_the_ends_of_the_hash_give_finite_noise(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends would give inf, and 2^22 draws meet neither."""
    monkeypatch.setattr(noise, "_mix_32_", lambda x: x.fill_(bits))
    assert 0 < float(uniform(addresses(range(1), range(1)), Stream.KEEP)) < 1
    assert gumbel(addresses(range(1), range(1)), Stream.PROPOSAL, 3).isfinite().all()


# ------ shaping

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


@given(logits=LOGITS, temperature=st.floats(0.1, 5), top_k=st.integers(0, 15), top_p=st.floats(0.01, 1))
def test_shaping_is_temperature_then_top_k_then_top_p(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    expected = shaped(logits, temperature, top_k, top_p)
    # If the mass in front of a token equals top_p up to the last bit, either answer is right.
    for near in (top_p * (1 - 1e-9), top_p * (1 + 1e-9)):
        assume(near > 1 or shaped(logits, temperature, top_k, near) == expected)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logp = shaped_logp(torch.tensor(logits, dtype=torch.float64), sampling)
    assert [value == -torch.inf for value in logp.tolist()] == [p == 0 for p in expected]
    # Two float64 roundings per token, over at most 12 tokens and logits of at most 200.
    torch.testing.assert_close(logp.exp(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@given(logits=LOGITS, temperature=st.floats(0.1, 5), top_k=st.integers(0, 15), top_p=st.floats(0.01, 1))
def test_shaped_distributions_are_normalized_and_keep_the_likeliest_token(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    values = torch.tensor(logits)
    logp = shaped_logp(values, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert logp.dtype == torch.float32
    assert abs(float(logp.exp().sum()) - 1) < 1e-5  # float32, 12 terms
    # Logits that differ by less than a rounding of their probabilities are a tie.
    assert logp[values > values.max() - 1e-5].max() > -torch.inf
    assert not logp.isnan().any()


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_shaping_treats_each_distribution_alone(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.8)
    together = shaped_logp(logits, sampling).reshape(-1, 5)
    for row, alone in zip(logits.reshape(-1, 5), together, strict=True):
        assert torch.equal(shaped_logp(row, sampling), alone)


def test_greedy_decoding_leaves_the_distribution_untouched() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -torch.inf])
    greedy = shaped_logp(logits, Sampling(temperature=0, top_k=1, top_p=0.1))
    assert torch.equal(greedy, torch.log_softmax(logits, dim=-1))


def test_a_setting_that_keeps_every_token_changes_nothing() -> None:
    logits = torch.randn(3, 17, generator=torch.Generator().manual_seed(0))
    plain = torch.log_softmax(logits, dim=-1)
    assert torch.equal(shaped_logp(logits, Sampling()), plain)
    assert torch.equal(shaped_logp(logits, Sampling(top_k=17)), plain)
    assert torch.equal(shaped_logp(logits, Sampling(top_k=40)), plain)


def test_equal_logits_at_the_edge_of_top_k_are_all_kept() -> None:
    logp = shaped_logp(torch.tensor([2.0, 1.0, 1.0, 0.0]), Sampling(top_k=2))
    assert (logp > -torch.inf).tolist() == [True, True, True, False]


def test_what_was_excluded_stays_excluded() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0, -1.0])
    logp = shaped_logp(logits, Sampling(temperature=2, top_k=3, top_p=0.99))
    assert logp[1] == -torch.inf
    assert logp[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_shaped_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(shaped_logp(logits, Sampling()), torch.log_softmax(logits.float(), dim=-1))
