"""Coded logits: what is kept is exact, what is left out keeps its mass, and numpy and torch decode the same bits."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from darht.cache.format.logit_codes import decode, encode_int8, encode_top
from darht.cache.read.draw import decode_tensors

C = 7
ANSWERS = arrays(np.float32, (3, 2, C), elements=st.floats(-30, 30, width=16))  # exact in float16, and often equal


def probabilities(logits: np.ndarray, tau: float = 1.0) -> np.ndarray:
    powers = np.exp((logits - logits.max(-1, keepdims=True)).astype(np.float64) / tau)
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300)))).sum(-1).mean())


@given(ANSWERS, st.integers(1, C - 1))
def test_the_largest_are_kept_and_the_rest_keeps_its_mass(logits: np.ndarray, k: int) -> None:
    main, classes = encode_top(logits, k, "int16")
    assert (main.dtype, main.shape, classes.dtype, classes.shape) == (np.float16, (3, 2, k + 1), np.int16, (3, 2, k))
    expected = np.argsort(-logits, axis=-1, kind="stable")[..., :k]  # of equal logits the lower class comes first
    np.testing.assert_array_equal(classes, expected)
    np.testing.assert_array_equal(main[..., :k], np.take_along_axis(logits, expected, -1))
    dense = decode(main, classes, C)
    np.testing.assert_array_equal(np.take_along_axis(dense, expected, -1), main[..., :k])
    lost = probabilities(logits) - probabilities(dense)
    assert np.abs(np.take_along_axis(lost, expected, -1)).max() < 0.01  # the mass of the rest is rounded to float16


@given(ANSWERS)
def test_eight_bits_are_off_by_half_a_step(logits: np.ndarray) -> None:
    codes, scale = encode_int8(logits)
    assert (codes.dtype, scale.shape) == (np.int8, (3, 2, 2))
    step = (logits.max(-1) - logits.min(-1)) / 254
    assert (np.abs(decode(codes, scale, C) - logits) <= step[..., None] * 0.5001 + 1e-5).all()


@given(ANSWERS, st.integers(1, C - 1))
def test_tensors_decode_to_the_same(logits: np.ndarray, k: int) -> None:
    for main, companion in (encode_top(logits, k, "int32"), encode_int8(logits)):
        tensors = decode_tensors(torch.from_numpy(main), torch.from_numpy(companion), C)
        np.testing.assert_allclose(tensors.numpy(), decode(main, companion, C), rtol=0, atol=1e-5)


def test_more_logits_and_more_bits_are_nearer() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (64, 200)).astype(np.float32)
    found = [
        kl(probabilities(logits, tau), probabilities(decode(*encode_top(logits, k, "int16"), 200), tau))
        for tau in (1.0, 4.0)
        for k in (5, 10, 32, 199)
    ]
    assert found[:4] == sorted(found[:4], reverse=True) and found[4:] == sorted(found[4:], reverse=True)
    assert found[3] < 1e-5 and found[7] < 1e-5
    assert kl(probabilities(logits), probabilities(decode(*encode_int8(logits), 200))) < 1e-3


def test_logits_beyond_float16_are_infinite_for_the_builder_to_refuse() -> None:
    main, _ = encode_top(np.array([[1e6, 0.0, 0.0]]), 1, "int16")
    assert np.isinf(main[0, 0])


def test_the_bytes_are_golden() -> None:
    logits = ((np.arange(24) * 37 % 23).reshape(2, 12) / 4).astype(np.float32)
    main, classes = encode_top(logits, 3, "int16")
    assert main.tobytes().hex() == "0045c0440044c044804540458044f944"
    assert classes.tobytes().hex() == "080003000b00060001000900"
    codes, scale = encode_int8(logits)
    assert codes.tobytes().hex() == "8133c072008e40cd7f0d9a4cd2730ca445dd7f17af51e981"
    assert scale.tobytes().hex() == "8542a13c00002040c662b13c00003040"
