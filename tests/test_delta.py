"""Deltas: pure, differentiable, jit-able addition to any tree of parameters, in the wider dtype, cast once."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kedit_jax.delta import (
    Dense,
    EditDelta,
    LowRank,
    add_on_host,
    apply_edits,
    host_kernel,
    parameter_paths,
    read_kernels,
    revert_edits,
    write_kernels,
)
from kedit_jax.errors import KeditError
from kedit_jax.models import Decoder, down_kernel_address, named_parameters

K, V, R = 6, 4, 2


def random(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def tree(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Plain dictionaries and lists; one kernel stands alone, three are stacked, one bears an unlucky name."""
    return {
        "blocks": [{"down": jnp.asarray(random(K, V, seed=i), dtype), "bias": jnp.zeros(V, dtype)} for i in range(2)],
        "stack": {"kernel": jnp.asarray(random(3, K, V), dtype)},
        "attention": {"query": jnp.asarray(random(K, V, seed=7), dtype), "value": jnp.asarray(random(K, V, seed=8), dtype)},
        "step": np.int32(3),
    }


def delta(dtype: Any = np.float32) -> EditDelta:
    return EditDelta(
        {
            "blocks.1.down": Dense(random(K, V, seed=11, dtype=dtype)),
            "stack.kernel[2]": LowRank(random(K, R, seed=12, dtype=dtype), random(R, V, seed=13, dtype=dtype)),
            "attention.value": Dense(random(K, V, seed=14, dtype=dtype)),
        }
    )


def expected(params: Any, edits: EditDelta, sign: float = 1.0) -> dict[str, np.ndarray]:
    """Every leaf, added in NumPy's float64 and cast once."""
    leaves = {path: np.array(leaf) for path, leaf in parameter_paths(params).items()}
    for address, update in edits.updates.items():
        factors = (update.left, update.right) if isinstance(update, LowRank) else (np.eye(update.shape[0]), update.update)
        dense = np.asarray(factors[0], np.float64) @ np.asarray(factors[1], np.float64)
        path, _, index = address.rstrip("]").partition("[")
        leaf = leaves[path]
        where = int(index) if index else ...
        leaf[where] = (leaf[where].astype(np.float64) + sign * dense).astype(leaf.dtype)
    return leaves


def assert_leaves(params: Any, leaves: dict[str, np.ndarray], rtol: float = 0.0) -> None:
    found = parameter_paths(params)
    assert found.keys() == leaves.keys()
    for path, leaf in found.items():
        assert np.asarray(leaf).dtype == leaves[path].dtype, path
        np.testing.assert_allclose(
            np.asarray(leaf, np.float64), np.asarray(leaves[path], np.float64), rtol=rtol, atol=rtol, err_msg=path
        )


def same(first: Any, second: Any) -> bool:
    """Bit for bit, with the same structure."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# --- the sum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True])
def test_every_update_is_added_and_nothing_else_changes(jitted: bool) -> None:
    apply = jax.jit(apply_edits) if jitted else apply_edits
    revert = jax.jit(revert_edits) if jitted else revert_edits
    assert_leaves(apply(tree(), delta()), expected(tree(), delta()), rtol=1e-6)
    assert_leaves(revert(tree(), delta()), expected(tree(), delta(), -1.0), rtol=1e-6)


def test_inputs_stay_as_they_were() -> None:
    params, edits = tree(), delta()
    params_before, edits_before = jax.tree.map(np.array, params), jax.tree.map(np.array, edits)
    edited = apply_edits(params, edits)
    revert_edits(edited, edits)
    assert same(params, params_before)
    assert same(edits, edits_before)
    assert not same(edited, params)


def test_what_was_applied_is_reverted_up_to_rounding() -> None:
    back = revert_edits(apply_edits(tree(), delta()), delta())
    assert_leaves(back, {path: np.asarray(leaf) for path, leaf in parameter_paths(tree()).items()}, rtol=1e-6)


def test_an_empty_delta_changes_nothing() -> None:
    assert same(apply_edits(tree(), EditDelta({})), tree())


@pytest.mark.parametrize("parameter", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("update", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_sums_are_made_in_the_wider_dtype_and_cast_once(parameter: Any, update: Any) -> None:
    params, edits = (
        {"w": jnp.asarray(random(64, 64), parameter)},
        EditDelta({"w": Dense(random(64, 64, seed=1, dtype=update))}),
    )
    exact = expected(params, edits)["w"]
    found = apply_edits(params, edits)["w"]
    assert found.dtype == parameter
    np.testing.assert_array_equal(np.asarray(found), exact)
    jitted = np.asarray(jax.jit(apply_edits)(params, edits)["w"])  # float64 arrives as float32: one more rounding
    np.testing.assert_array_equal(jitted, exact) if update != np.float64 else np.testing.assert_allclose(
        jitted.astype(np.float64), exact.astype(np.float64), rtol=float(jnp.finfo(parameter).eps), atol=1e-6
    )


def test_negative_control_adding_in_the_narrow_dtype_differs() -> None:
    params, update = jnp.asarray(random(64, 64), jnp.bfloat16), random(64, 64, seed=1)
    narrow = np.asarray(params + jnp.asarray(update).astype(jnp.bfloat16))
    assert (narrow != np.asarray(apply_edits({"w": params}, EditDelta({"w": Dense(update)}))["w"])).mean() > 0.1


def test_host_float64_is_not_rounded_before_it_is_added() -> None:
    """1 and 2^-24 + 2^-40 sum to just above a float32 tie; rounded to float32 first, 2^-40 would be lost."""
    params = {"w": jnp.ones((1, 1))}
    edits = EditDelta({"w": Dense(np.array([[2.0**-24 + 2.0**-40 + 2.0**-60]]))})
    assert float(apply_edits(params, edits)["w"][0, 0]) == 1 + 2.0**-23
    assert float(jax.jit(lambda p: p["w"] + 2.0**-24)(params)[0, 0]) == 1.0
    left, right = np.array([[1.0, 1.0]]), np.array([[2.0**-24], [2.0**-60]])
    assert LowRank(left, right).dense().dtype == np.float64
    assert (EditDelta({"w": LowRank(left, right)}) + edits)["w"].dense().dtype == np.float64


def test_jit_takes_host_float64_without_x64_and_keeps_it_with_x64() -> None:
    assert_leaves(jax.jit(apply_edits)(tree(), delta(np.float64)), expected(tree(), delta(np.float64)), rtol=1e-6)
    closed = jax.jit(lambda params: apply_edits(params, delta(np.float64)))
    assert_leaves(closed(tree()), expected(tree(), delta(np.float64)), rtol=1e-6)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) if np.ndim(leaf) else leaf, tree())
        added = jax.jit(apply_edits)(wide, delta(np.float64))
        leaves = {path: np.asarray(leaf) for path, leaf in parameter_paths(added).items()}
        correct = expected(wide, delta(np.float64))
    for path in ("blocks.1.down", "stack.kernel", "attention.value"):
        assert leaves[path].dtype == np.float64
        np.testing.assert_allclose(leaves[path], correct[path], rtol=1e-14)


def test_low_rank_and_dense_are_the_same_update() -> None:
    factors = delta()["stack.kernel[2]"]
    dense = EditDelta({"stack.kernel[2]": Dense(np.asarray(factors.dense()))})
    low_rank = EditDelta({"stack.kernel[2]": factors})
    assert factors.shape == dense["stack.kernel[2]"].shape == (K, V)
    assert_leaves(
        apply_edits(tree(), low_rank), {p: np.asarray(x) for p, x in parameter_paths(apply_edits(tree(), dense)).items()}
    )


def test_buffers_can_be_donated() -> None:
    params = {"stack": {"kernel": jnp.asarray(random(3, K, V))}}
    edits = EditDelta({"stack.kernel[1]": Dense(random(K, V, seed=1))})
    correct = expected(params, edits)
    held = params["stack"]["kernel"]
    edited = jax.jit(apply_edits, donate_argnums=0)(params, edits)
    assert held.is_deleted()
    assert_leaves(edited, correct, rtol=1e-6)


# --- derivatives ----------------------------------------------------------------------------------------------------


def test_the_sum_is_differentiated_in_parameters_and_updates() -> None:
    """Against central differences of a nonlinear function of the edited parameters, in float64."""

    def loss(params: Any, edits: EditDelta) -> Any:
        edited = apply_edits(params, edits)
        x = jnp.tanh(jnp.ones((2, K), edited["w"].dtype) @ edited["w"])
        return (jnp.sin(x @ edited["s"][1].T) ** 2).sum()

    with jax.enable_x64(True):
        params = {"w": jnp.asarray(random(K, V, dtype=np.float64)), "s": jnp.asarray(random(2, K, V, dtype=np.float64))}
        edits = EditDelta(
            {
                "w": LowRank(jnp.asarray(random(K, R, dtype=np.float64)), jnp.asarray(random(R, V, dtype=np.float64))),
                "s[1]": Dense(jnp.asarray(random(K, V, seed=3, dtype=np.float64))),
            }
        )
        slope = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, edits)
        value = jax.jit(loss)
        at, along = (
            (params, edits),
            jax.tree.map(lambda x: jnp.asarray(random(*x.shape, seed=5, dtype=np.float64)), (params, edits)),
        )
        step = 1e-5
        ahead, behind = (value(*jax.tree.map(lambda x, d, sign=sign: x + sign * step * d, at, along)) for sign in (1, -1))
        predicted = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(slope), jax.tree.leaves(along), strict=True))
        assert float(ahead - behind) / (2 * step) == pytest.approx(predicted, rel=1e-7)
        assert abs(predicted) > 1e-2
        assert not slope[0]["s"][0].any(), "what is not used has no gradient"


def test_gradients_pass_through_a_model(model: Decoder) -> None:
    """Of a sum over one edited kernel, in the factors of its update: the other factor's sums, known without autodiff."""
    address, left, right = down_kernel_address(1), jnp.asarray(random(160, R)), jnp.asarray(random(R, 16))

    def total(edits: EditDelta) -> Any:
        return named_parameters(apply_edits(model, edits))["layers.mlp.down.kernel"].sum()

    slope = jax.jit(jax.grad(total))(EditDelta({address: LowRank(left, right)}))[address]
    np.testing.assert_allclose(slope.left, np.tile(np.asarray(right).sum(1), (160, 1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope.right, np.tile(np.asarray(left).sum(0)[:, None], (1, 16)), rtol=1e-5, atol=1e-5)


# --- models ---------------------------------------------------------------------------------------------------------


def test_a_decoder_is_edited_like_any_tree(model: Decoder) -> None:
    update = random(160, 16)
    address = down_kernel_address(2)
    edited = jax.jit(apply_edits)(model, EditDelta({address: Dense(update)}))
    assert type(edited) is Decoder
    assert edited.config is model.config
    for name, before in named_parameters(model).items():
        after = np.asarray(named_parameters(edited)[name])
        if name == "layers.mlp.down.kernel":
            np.testing.assert_array_equal(after[2], np.asarray(before)[2] + update)
            np.testing.assert_array_equal(after[[0, 1, 3]], np.asarray(before)[[0, 1, 3]])
        else:
            np.testing.assert_array_equal(after, before)


def test_kernels_are_read_and_written_by_address(model: Decoder) -> None:
    address = down_kernel_address(3)
    kernel = read_kernels(model, [address])[address]
    np.testing.assert_array_equal(kernel, named_parameters(model)["layers.mlp.down.kernel"][3])
    written = write_kernels(model, {address: np.asarray(kernel, np.float64) + 1})
    np.testing.assert_array_equal(read_kernels(written, [address])[address], np.asarray(kernel) + 1)
    assert same(write_kernels(written, {address: kernel}), model)


def test_stacks_are_written_in_place_when_given_up(model: Decoder) -> None:
    address, other = down_kernel_address(1), down_kernel_address(2)
    before = jax.tree.map(np.array, named_parameters(model))
    kernel = np.asarray(read_kernels(model, [address])[address]) + 1
    ours = write_kernels(model, {address: kernel})
    stack = named_parameters(ours)["layers.mlp.down.kernel"]
    place = stack.unsafe_buffer_pointer()
    written = write_kernels(ours, {other: kernel}, donate=True)
    assert stack.is_deleted()
    assert named_parameters(written)["layers.mlp.down.kernel"].unsafe_buffer_pointer() == place
    assert same(written, write_kernels(model, {address: kernel, other: kernel}))
    assert same(named_parameters(model), before), "negative control: what was not given up is as it was"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_sums_are_rounded_once(dtype: type) -> None:
    kernel, update = random(K, V).astype(dtype), random(K, V, seed=1, dtype=np.float64)
    for sign in (1.0, -1.0):
        found = add_on_host(kernel, update, sign)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, (kernel.astype(np.float64) + sign * update).astype(dtype))


def test_a_kernel_is_looked_at_where_it_is(model: Decoder) -> None:
    address = down_kernel_address(3)
    found = host_kernel(model, address)
    np.testing.assert_array_equal(found, read_kernels(model, [address])[address])
    assert np.shares_memory(found, np.asarray(named_parameters(model)["layers.mlp.down.kernel"]))
    assert not found.flags.writeable
    with pytest.raises(KeditError, match="no such parameter"):
        host_kernel(model, "layers.mlp.up.nothing[0]")


# --- deltas as values -----------------------------------------------------------------------------------------------


def test_deltas_add_and_scale() -> None:
    first, second = delta(np.float64), EditDelta({
        "stack.kernel[2]": LowRank(random(K, 1, dtype=np.float64), random(1, V, dtype=np.float64)),
        "blocks.0.down": Dense(random(K, V, seed=21, dtype=np.float64)),
    })  # fmt: skip
    total = first + second
    assert set(total.addresses) == set(first.addresses) | set(second.addresses)
    with_both = apply_edits(apply_edits(tree(), first), second)
    leaves = {path: np.asarray(leaf) for path, leaf in parameter_paths(with_both).items()}
    assert_leaves(apply_edits(tree(), total), leaves, rtol=1e-6)
    np.testing.assert_allclose(
        total["stack.kernel[2]"].dense(), first["stack.kernel[2]"].dense() + second["stack.kernel[2]"].dense(), rtol=1e-14
    )
    assert same(apply_edits(tree(), first.scaled(-1.0)), revert_edits(tree(), first))


def test_sums_stay_factors_only_while_that_is_smaller() -> None:
    def ones(rank: int) -> EditDelta:
        return EditDelta({"w": LowRank(np.ones((8, rank)), np.ones((rank, 8)))})

    assert isinstance((ones(1) + ones(2))["w"], LowRank)  # 3 * 16 < 64
    assert isinstance((ones(2) + ones(2))["w"], Dense)  # 4 * 16 = 64
    assert isinstance((ones(1) + EditDelta({"w": Dense(np.ones((8, 8)))}))["w"], Dense)
    np.testing.assert_array_equal((ones(1) + ones(2))["w"].dense(), 3)
    np.testing.assert_array_equal((ones(2) + ones(2))["w"].dense(), 4)
    with pytest.raises(KeditError, match=r"\(8, 8\) and \(2, 2\)"):
        ones(1) + EditDelta({"w": Dense(np.ones((2, 2)))})


def test_deltas_are_pytrees() -> None:
    edits = delta()
    leaves, structure = jax.tree.flatten(edits)
    assert len(leaves) == 4
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert isinstance(rebuilt, EditDelta)
    assert same(rebuilt, edits)
    assert set(jax.jit(lambda e: e.scaled(2.0))(edits).addresses) == set(edits.addresses)


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply", [apply_edits, revert_edits, jax.jit(apply_edits)])
def test_everything_that_does_not_fit_is_in_one_error(apply: Any) -> None:
    update = Dense(np.zeros((K, V), np.float32))
    wrong = {
        "blocks.9.down": "no such parameter",
        "stack.kernel": r"no kernel \[k, v\]",
        "stack.kernel[3]": "no kernel number 3",
        "blocks.0.down[0]": "no kernel number 0",
        "blocks.0.bias": "no kernel",
        "step": "no kernel",
        "attention": "no such parameter",
    }
    edits = dict.fromkeys(wrong, update) | {
        "blocks.0.down": Dense(np.zeros((V, K), np.float32)),
        "stack.kernel[0]": LowRank(np.zeros((K, 1), np.float32), np.zeros((1, V + 1), np.float32)),
        "stack.kernel[1]": update,
    }
    with pytest.raises(KeditError) as caught:
        apply(tree() | {"step": 3}, EditDelta(edits))
    problems = str(caught.value).splitlines()[1:]
    assert len(problems) == len(wrong) + 2
    for address in [*wrong, "blocks.0.down", "stack.kernel[0]"]:
        assert any(problem.startswith(f"  - {address}:") for problem in problems), address
    assert "stack.kernel[1]" not in str(caught.value)
    assert "shape (6, 4), its update (4, 6)" in str(caught.value)


@pytest.mark.parametrize("address", ["", "w[", "w[-1]", "w[01]", "w[1][2]", "w[x]", "[0]"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(KeditError, match="is no address"):
        apply_edits({"w": jnp.zeros((2, K, V))}, EditDelta({address: Dense(np.zeros((K, V)))}))


def test_negative_control_the_fitting_delta_is_accepted() -> None:
    assert set(read_kernels(tree(), delta().addresses)) == set(delta().addresses)


def test_numpy_parameters_stay_numpy_in_their_own_dtype() -> None:
    params = {"w": np.ones((2, 3)), "stack": np.ones((2, 2, 3))}
    tiny = Dense(np.full((2, 3), 1e-12))
    edited = apply_edits(params, EditDelta({"w": tiny, "stack[1]": tiny}))
    for kernel in (edited["w"], edited["stack"][1]):
        assert isinstance(kernel, np.ndarray)
        assert kernel.dtype == np.float64
        assert (kernel == 1 + 1e-12).all()
    assert (edited["stack"][0] == 1).all()
    assert (params["stack"] == 1).all()
