"""The shipped losses and their gradients, against the reference implementation's own numbers and against themselves.

`data/reference_losses.npz` holds what the reference implementation of PPD did on random batches: tabular policies, a row a
sample, one full-batch gradient step of size 1 without clipping, so that the change of each table is minus its gradient.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppd_mujoco
import train_teacher

GOLDEN = dict(np.load(Path(__file__).parent / "data/reference_losses.npz"))
CASES = sorted({key.rsplit("/", 1)[0] for key in GOLDEN})
GAUSSIAN = [case for case in CASES if case.startswith("gaussian")]


def load(case):
    return {key.rsplit("/", 1)[1]: jnp.asarray(value) for key, value in GOLDEN.items() if key.rsplit("/", 1)[0] == case}


def tables(d):
    return {"mean": d["student_out"], "log_std": d["student_log_std"], "values": d["values"]}


def ppd_batch(d):
    n = len(d["actions"])
    teacher = (d["teacher_out"], jnp.broadcast_to(d["teacher_log_std"], d["teacher_out"].shape))
    return ppd_mujoco.Batch(None, d["actions"], d["old_logprobs"], d["advantages"], d["returns"], jnp.ones(n), teacher)


def outputs(t):
    return t["mean"], jnp.broadcast_to(t["log_std"], t["mean"].shape)


def ppd(t, d, lam, direction, batch=None):
    return ppd_mujoco.ppd_loss(outputs(t), t["values"], batch or ppd_batch(d), lam, d["clip_coef"], d["ent_coef"], d["vf_coef"],
                               direction)


def ppo(t, d):
    batch = train_teacher.Batch(*ppd_batch(d)[:-1])
    return train_teacher.ppo_loss(outputs(t), t["values"], batch, d["clip_coef"], d["ent_coef"], d["vf_coef"])


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance)


def test_the_data_covers_what_it_should():
    assert len(CASES) == 10 and len(GAUSSIAN) == 5


@pytest.mark.parametrize("case", GAUSSIAN)
def test_ppd_equals_the_reference(case):
    d = load(case)
    direction = case.split("/")[1]
    grad, metrics = jax.grad(ppd, has_aux=True)(tables(d), d, d["lam"], direction)
    close(metrics["loss"], d["loss"])
    close(metrics["policy_loss"], d["policy_gradient_loss"])
    close(metrics["value_loss"], d["value_loss"])
    close(-metrics["entropy"], d["entropy_loss"])
    if d["lam"] > 0:  # at 0 the reference does not compute the term
        close(d["lam"] * metrics["distill_loss"], d["distillation_loss"])
    close(metrics["approx_kl"], d["approx_kl"])
    close(metrics["clipfrac"], d["clip_fraction"])
    close(grad["mean"], d["grad_out"])
    close(grad["log_std"], d["grad_log_std"])
    close(grad["values"], d["grad_values"])


@pytest.mark.parametrize("case", [case for case in GAUSSIAN if case.endswith("lambda0")])
def test_ppo_equals_the_reference_without_distillation(case):
    d = load(case)
    grad, metrics = jax.grad(ppo, has_aux=True)(tables(d), d)
    close(metrics["loss"], d["loss"])
    close(grad["mean"], d["grad_out"])
    close(grad["log_std"], d["grad_log_std"])
    close(grad["values"], d["grad_values"])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_lambda_zero_is_ppo_in_loss_and_gradient(direction):
    d = load(GAUSSIAN[-1])
    (a, _), grad_a = jax.value_and_grad(ppd, has_aux=True)(tables(d), d, 0.0, direction)
    (b, _), grad_b = jax.value_and_grad(ppo, has_aux=True)(tables(d), d)
    close(a, b, 1e-7)
    jax.tree.map(lambda x, y: close(x, y, 1e-7), grad_a, grad_b)


def distill_only(t, d, direction):
    return ppd(t, d, 1.0, direction)[1]["distill_loss"]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_gradient_of_the_ppd_term_is_that_of_finite_differences(direction):
    """In float64, so that a central difference is exact to about 1e-9; a detached ratio would be off by 10%."""
    with jax.enable_x64(True):
        d = {k: v.astype(jnp.float64) for k, v in load("gaussian/forward/lambda1").items()}
        grad = jax.grad(distill_only)(tables(d), d, direction)
        for index in [(0, 0), (7, 1), (31, 0), (63, 2)]:
            step = 1e-6
            up, down = (tables(d) | {"mean": d["student_out"].at[index].add(sign * step)} for sign in (1, -1))
            numeric = (distill_only(up, d, direction) - distill_only(down, d, direction)) / (2 * step)
            assert float(grad["mean"][index]) == pytest.approx(float(numeric), rel=1e-5, abs=1e-9)


def test_the_ratio_is_not_detached():
    """With KL held constant the term still has a gradient, where the ratio is above 1 - ε, and none where it is below."""
    one = jnp.zeros(1)
    sample = ppd_mujoco.Batch(None, jnp.array([1.0]), 0.0, 0.0, 0.0, 1.0, (one + 2.0, one))

    def term(mean, old_log_prob):
        terms = ppd_mujoco.ppd_terms((mean, one), jnp.float32(0.0), sample._replace(log_probs=old_log_prob), 0.2, "forward")
        return terms["distill_loss"]

    log_prob = -0.5 * (1.0 - 0.5) ** 2 - 0.5 * np.log(2 * np.pi)
    mean, kl, d_kl, d_log_prob = 0.5, 0.5 * 1.5**2, 0.5 - 2.0, 1.0 - 0.5
    above = jax.grad(lambda m: term(m, log_prob - np.log(1.5)))(jnp.array([mean]))  # ratio 1.5
    assert float(above[0]) == pytest.approx(1.5 * d_kl + kl * 1.5 * d_log_prob, rel=1e-5)
    below = jax.grad(lambda m: term(m, log_prob - np.log(0.5)))(jnp.array([mean]))  # ratio 0.5: clipped to 0.8
    assert float(below[0]) == pytest.approx(0.8 * d_kl, rel=1e-5)


def test_phantoms_weigh_nothing_in_any_term():
    d = load("gaussian/forward/lambda2")
    keep = np.arange(64) % 3 != 0
    batch = ppd_batch(d)
    spoiled = batch._replace(weights=jnp.asarray(keep, jnp.float32), advantages=jnp.where(keep, batch.advantages, 1e3),
                             returns=jnp.where(keep, batch.returns, -1e3), log_probs=jnp.where(keep, batch.log_probs, 5.0))
    kept = jax.tree.map(lambda x: x[keep], batch)
    grad, metrics = jax.grad(ppd, has_aux=True)(tables(d), d, 2.0, "forward", spoiled)
    small = tables(d) | {"mean": d["student_out"][keep], "values": d["values"][keep]}
    grad_kept, metrics_kept = jax.grad(ppd, has_aux=True)(small, d, 2.0, "forward", kept)
    for name in metrics:
        close(metrics[name], metrics_kept[name])
    close(grad["mean"][keep], grad_kept["mean"])
    close(grad["log_std"], grad_kept["log_std"])
    assert not np.asarray(grad["mean"])[~keep].any() and not np.asarray(grad["values"])[~keep].any()
