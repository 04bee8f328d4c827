"""Post-processors against their definitions written out in NumPy, and what they refuse."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from literal_sequences import LITERAL
from solve_problems import F32, F64, relative

from kedit_jax import solve
from kedit_jax.errors import SolverError
from kedit_jax.solve.postprocess import ClipNorm, Prune, Quantized, Rect, Rounded, Truncate, describe, process

NAMES = sorted(LITERAL)


def arrays(seed: int = 0, shape: tuple[int, int] = (24, 10), dtype: np.dtype = F64) -> tuple[np.ndarray, np.ndarray]:
    """An update with some singular values above the kernel's largest, and the kernel."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, min(shape))))[0] for n in shape)
    update = (left * np.logspace(1.5, -2, min(shape))) @ right.T
    return update.astype(dtype), (rng.normal(size=shape) / np.sqrt(shape[0])).astype(dtype)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)], ids=str)
@pytest.mark.parametrize("name", NAMES)
class TestDefinitions:
    def test_as_defined(self, name, shape):
        update, kernel = arrays(shape=shape)
        post, literal = solve.parse_post(name), LITERAL[name](update, kernel)
        result = np.asarray(post(update, kernel))
        assert result.dtype == F64
        assert relative(result, literal) <= 1e-13
        assert relative(result, update) > 1e-3  # all of them do something here
        other = kernel[::-1].copy() if name != "prune" else 3 * kernel
        changed = relative(post(update, other), result) > 1e-6
        assert changed == (name.split(":")[0] not in ("clip", "truncate"))

    def test_under_jit_and_vmap(self, name, shape):
        pairs = [arrays(seed, shape) for seed in range(3)]
        post = solve.parse_post(name)
        with solve.float64():
            update, kernel = (jnp.stack(many) for many in zip(*pairs, strict=True))
            results = jax.jit(jax.vmap(post))(update, kernel)
        for result, pair in zip(results, pairs, strict=True):
            assert relative(result, LITERAL[name](*pair)) <= 1e-13

    def test_float32_stays_float32(self, name, shape):
        update, kernel = arrays(shape=shape, dtype=F32)
        result = solve.parse_post(name)(update, kernel)
        assert result.dtype == F32
        literal = LITERAL[name](update.astype(F64), kernel.astype(F64))
        assert relative(result, literal) <= 1e-5
        with jax.numpy_dtype_promotion("strict"):
            assert jax.eval_shape(solve.parse_post(name), update, kernel.astype(F64).astype(F32)).dtype == F32


class TestPrune:
    def test_singular_values(self):
        update, kernel = arrays()
        before, largest = np.linalg.svd(update)[1], np.linalg.norm(kernel, 2)
        after = np.linalg.svd(np.asarray(Prune()(update, kernel)))[1]
        above = before > largest
        assert 0 < above.sum() < len(before)
        assert np.allclose(after, np.where(above, np.log(before / largest) + largest, before), rtol=1e-12, atol=0)

    def test_a_small_update_is_untouched(self):
        update, kernel = arrays()
        small = update * 0.9 * np.linalg.norm(kernel, 2) / np.linalg.norm(update, 2)
        assert np.array_equal(Prune()(small, kernel), small)

    def test_a_kernel_of_zeros_is_reported_as_not_finite(self):
        update, kernel = arrays()
        assert not np.isfinite(np.asarray(Prune()(update, 0 * kernel))).all()


class TestRect:
    @pytest.mark.parametrize("share", [0.2, 0.4, 1.0])
    def test_share_of_the_largest_relative_changes(self, share):
        update, kernel = arrays()
        result, change = np.asarray(Rect(share)(update, kernel)), np.abs(update / kernel)
        kept = result != 0
        assert kept.sum() == round(share * update.size)
        assert np.array_equal(result[kept], update[kept])
        if share < 1:
            assert change[kept].min() > change[~kept].max()

    def test_zeros_of_kernel_and_update(self):
        update, kernel = arrays()
        kernel[0, 0] = kernel[1, 1] = update[1, 1] = 0.0
        result = np.asarray(Rect(0.05)(update, kernel))
        assert result[0, 0] == update[0, 0]
        assert result[1, 1] == 0
        assert np.isfinite(result).all()
        assert (np.asarray(Rect(0.4)(0 * update, kernel)) == 0).all()


class TestClipAndTruncate:
    def test_limit(self):
        update, kernel = arrays()
        norm = float(np.linalg.norm(update))
        assert np.linalg.norm(np.asarray(ClipNorm(norm / 3)(update, kernel))) == pytest.approx(norm / 3, rel=1e-13)
        assert np.array_equal(ClipNorm(norm * 1.01)(update, kernel), update)
        assert (np.asarray(ClipNorm(1.0)(0 * update, kernel)) == 0).all()

    def test_rank(self):
        update, kernel = arrays()
        assert np.linalg.matrix_rank(np.asarray(Truncate(3)(update, kernel))) == 3
        assert np.array_equal(Truncate(10)(update, kernel), update)
        assert np.array_equal(Truncate(99)(update, kernel), update)


class TestNumberFormats:
    @pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
    def test_the_kernel_afterwards_is_representable(self, name):
        update, kernel = arrays(3, (60, 40))
        kernel *= 1e-4  # in reach of float16's subnormal numbers, which must not be flushed to 0
        update *= 1e-5
        rounded = (kernel + update).astype(getattr(ml_dtypes, name, name)).astype(F64)
        for post in (Rounded(name), jax.jit(Rounded(name))):
            with solve.float64():
                after = kernel + np.asarray(post(update, kernel))
            assert np.allclose(after, rounded, rtol=1e-14, atol=1e-19)
        assert relative(rounded, kernel + update) > 1e-9

    def test_beyond_the_range_is_reported_as_not_finite(self):
        update, kernel = arrays()
        assert not np.isfinite(np.asarray(Rounded("float16")(1e6 * update, kernel))).all()
        assert np.isfinite(np.asarray(Rounded("bfloat16")(1e6 * update, kernel))).all()

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_integers_with_a_scale_for_each_column(self, bits):
        update, kernel = arrays()
        update[:, 4] = kernel[:, 4] = 0.0
        after = kernel + np.asarray(Quantized(bits)(update, kernel))
        assert (after[:, 4] == 0).all()
        scale = np.abs(kernel + update).max(0) / (2 ** (bits - 1) - 1)
        levels = np.delete(after / np.where(scale, scale, 1), 4, axis=1)
        assert np.allclose(levels, np.round(levels), atol=1e-9)
        assert np.abs(levels).max() <= 2 ** (bits - 1) - 1 + 1e-9
        assert (np.abs(after - kernel - update) <= scale / 2 * (1 + 1e-9)).all()


class TestParsing:
    @pytest.mark.parametrize(
        ("text", "post"),
        [
            ("prune", Prune()),
            ("rect", Rect(0.4)),
            ("rect:0.2", Rect(0.2)),
            ("clip:3", ClipNorm(3.0)),
            ("truncate:8", Truncate(8)),
            ("round", Rounded("bfloat16")),
            ("round:float16", Rounded("float16")),
            ("quantize:4", Quantized(4)),
        ],
    )
    def test_by_name(self, text, post):
        assert solve.parse_post(text) == post
        assert hash(solve.parse_post(text)) == hash(post)  # jax.jit caches by it

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("purne", r"'purne' is unknown: one of prune, rect\[:SHARE\], clip:LIMIT, truncate:RANK"),
            ("", "unknown"),
            ("prune:3", "says too much: write prune$"),
            ("clip", "incomplete .* write clip:LIMIT"),
            ("rect:", r"incomplete .* write rect\[:SHARE\]"),
            ("truncate:2.5", r"'2.5' is no int; write truncate:RANK"),
            ("clip:much", r"'much' is no float"),
            ("rect:1.5", r"'rect:1.5': share must be in \(0, 1\], got 1.5"),
            ("round:int8", "format must be one of bfloat16, float16, float32, got 'int8'"),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_what_cannot_be_read(self, text, message):
        with pytest.raises(SolverError, match=message):
            solve.parse_post(text)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Rect(0.0),
            lambda: Rect(float("nan")),
            lambda: Rect(1.1),
            lambda: ClipNorm(0.0),
            lambda: ClipNorm(float("inf")),
            lambda: ClipNorm(float("nan")),
            lambda: Truncate(0),
            lambda: Truncate(1.5),
            lambda: Rounded("float8"),
            lambda: Quantized(1),
            lambda: Quantized(17),
            lambda: Quantized(7.5),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_parameters_out_of_range(self, make):
        with pytest.raises(SolverError, match=r"(share|limit|rank|format|bits) must be .*, got "):
            make()

    def test_the_registry_is_complete_and_read_only(self):
        assert set(solve.POSTS) == {name.split(":")[0] for name in NAMES}
        with pytest.raises(TypeError):
            solve.POSTS["mine"] = Prune


class TestAnyFunction:
    def test_plain_numpy(self):
        update, kernel = arrays()
        assert np.array_equal(process(lambda u, w: np.clip(u, -0.1, 0.1), update, kernel), np.clip(update, -0.1, 0.1))
        assert process(lambda u, w: jnp.asarray(u, jnp.bfloat16), update, kernel).dtype == F64

    @pytest.mark.parametrize(
        ("result", "given"),
        [
            (lambda u, w: u.T, r"shape \(10, 24\) of float64"),
            (lambda u, w: u[0], r"shape \(10,\)"),
            (lambda u, w: None, "NoneType"),
            (lambda u, w: u > 0, "of bool"),
            (lambda u, w: u * 1j, "of complex128"),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_other_results_are_named(self, result, given):
        with pytest.raises(SolverError, match=rf"<lambda> returned .*{given}.* an update of shape \(24, 10\)"):
            process(result, *arrays())

    def test_described(self):
        assert [describe(post) for post in (None, Rect(0.2), arrays)] == ["none", "Rect(share=0.2)", "arrays"]
