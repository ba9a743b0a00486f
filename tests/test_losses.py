"""The shipped losses and their gradients, against the reference implementation's own numbers and against themselves.

ppd_procgen.py has the loss of ppd_atari.py, and teacher_distill.py that of student_distill.py, as test_shared_blocks.py holds.

`data/reference_losses.npz` holds what the reference implementation of PPD did on random batches: tabular policies, a row a
sample, one full-batch gradient step of size 1 without clipping, so that the change of each table is minus its gradient.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppd_atari
import ppd_gymnax
import ppd_mujoco
import student_distill
import train_teacher

GOLDEN = dict(np.load(Path(__file__).parent / "data/reference_losses.npz"))
CASES = sorted({key.rsplit("/", 1)[0] for key in GOLDEN})
GAUSSIAN = [case for case in CASES if case.startswith("gaussian")]
DISCRETE = [case for case in CASES if case.startswith("discrete")]
PPD = [(ppd_mujoco, case) for case in GAUSSIAN] + [(ppd_atari, case) for case in DISCRETE]
PPD += [(ppd_gymnax, case) for case in CASES]


def load(case):
    d = {key.rsplit("/", 1)[1]: jnp.asarray(value) for key, value in GOLDEN.items() if key.rsplit("/", 1)[0] == case}
    return d | {"discrete": case.startswith("discrete")}


def tables(d):
    """What learns: a row a sample, and the log standard deviation of a Gaussian policy."""
    log_std = {} if d["discrete"] else {"log_std": d["student_log_std"]}
    return {"out": d["student_out"], "values": d["values"]} | log_std


def outputs(t):
    return (t["out"], jnp.broadcast_to(t["log_std"], t["out"].shape)) if "log_std" in t else t["out"]


def teacher_outputs(d):
    return d["teacher_out"] if d["discrete"] else (d["teacher_out"], jnp.broadcast_to(d["teacher_log_std"], d["teacher_out"].shape))


def ppd_batch(m, d):
    weights = () if m is ppd_gymnax else (jnp.ones(len(d["actions"])),)  # there is no phantom in gymnax
    return m.Batch(None, d["actions"], d["old_logprobs"], d["advantages"], d["returns"], *weights, teacher_outputs(d))


def ppd(t, m, d, lam, direction, batch=None, weight="ratio"):
    return m.ppd_loss(outputs(t), t["values"], batch or ppd_batch(m, d), lam, d["clip_coef"], d["ent_coef"], d["vf_coef"], direction, weight)


def ppo(t, d):
    batch = train_teacher.Batch(*ppd_batch(ppd_mujoco, d)[:-1])
    return train_teacher.ppo_loss(outputs(t), t["values"], batch, d["clip_coef"], d["ent_coef"], d["vf_coef"])


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance)


def is_reference(grad, d):
    close(grad["out"], d["grad_out"])
    close(grad["values"], d["grad_values"])
    if not d["discrete"]:
        close(grad["log_std"], d["grad_log_std"])


def test_the_data_covers_what_it_should():
    assert len(GAUSSIAN) == len(DISCRETE) == 5 and len(PPD) == 20


@pytest.mark.parametrize(("m", "case"), PPD)
def test_ppd_equals_the_reference(m, case):
    d = load(case)
    grad, metrics = jax.grad(ppd, has_aux=True)(tables(d), m, d, d["lam"], case.split("/")[1])
    close(metrics["loss"], d["loss"])
    close(metrics["policy_loss"], d["policy_gradient_loss"])
    close(metrics["value_loss"], d["value_loss"])
    close(-metrics["entropy"], d["entropy_loss"])
    if d["lam"] > 0:  # at 0 the reference does not compute the term
        close(d["lam"] * metrics["distill_loss"], d["distillation_loss"])
    close(metrics["approx_kl"], d["approx_kl"])
    close(metrics["clipfrac"], d["clip_fraction"])
    is_reference(grad, d)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("lambda0")])
def test_ppo_equals_the_reference_without_distillation(case):
    d = load(case)
    grad, metrics = jax.grad(ppo, has_aux=True)(tables(d), d)
    close(metrics["loss"], d["loss"])
    is_reference(grad, d)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("m", "case"), [(ppd_mujoco, GAUSSIAN[-1]), (ppd_atari, DISCRETE[-1]), (ppd_gymnax, GAUSSIAN[-1]),
                                         (ppd_gymnax, DISCRETE[-1])])
def test_lambda_zero_is_ppo_in_loss_and_gradient(m, case, direction):
    d = load(case)
    (a, _), grad_a = jax.value_and_grad(ppd, has_aux=True)(tables(d), m, d, 0.0, direction)
    (b, _), grad_b = jax.value_and_grad(ppo, has_aux=True)(tables(d), d)
    close(a, b, 1e-7)
    jax.tree.map(lambda x, y: close(x, y, 1e-7), grad_a, grad_b)


def distill_only(t, m, d, direction):
    return ppd(t, m, d, 1.0, direction)[1]["distill_loss"]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("m", "kind"), [(ppd_mujoco, "gaussian"), (ppd_atari, "discrete")])
def test_the_gradient_of_the_ppd_term_is_that_of_finite_differences(m, kind, direction):
    """In float64, so that a central difference is exact to about 1e-9; a detached ratio would be off by 10%."""
    with jax.enable_x64(True):
        d = {k: v.astype(jnp.float64) if k not in ("actions", "discrete") or kind == "gaussian" and k == "actions" else v
             for k, v in load(f"{kind}/forward/lambda1").items()}
        grad = jax.grad(distill_only)(tables(d), m, d, direction)
        for index in [(0, 0), (7, 1), (31, 0), (63, 2)]:
            step = 1e-6
            up, down = (tables(d) | {"out": d["student_out"].at[index].add(sign * step)} for sign in (1, -1))
            numeric = (distill_only(up, m, d, direction) - distill_only(down, m, d, direction)) / (2 * step)
            assert float(grad["out"][index]) == pytest.approx(float(numeric), rel=1e-5, abs=1e-9)


def test_the_ratio_is_not_detached():
    """With KL held constant the term still has a gradient, where the ratio is above 1 - ε, and none where it is below."""
    one = jnp.zeros(1)
    sample = ppd_mujoco.Batch(None, jnp.array([1.0]), 0.0, 0.0, 0.0, 1.0, (one + 2.0, one))

    def term(mean, old_log_prob):
        terms = ppd_mujoco.ppd_terms((mean, one), jnp.float32(0.0), sample._replace(log_probs=old_log_prob), 0.2, "forward", "ratio")
        return terms["distill_loss"]

    log_prob = -0.5 * (1.0 - 0.5) ** 2 - 0.5 * np.log(2 * np.pi)
    mean, kl, d_kl, d_log_prob = 0.5, 0.5 * 1.5**2, 0.5 - 2.0, 1.0 - 0.5
    above = jax.grad(lambda m: term(m, log_prob - np.log(1.5)))(jnp.array([mean]))  # ratio 1.5
    assert float(above[0]) == pytest.approx(1.5 * d_kl + kl * 1.5 * d_log_prob, rel=1e-5)
    below = jax.grad(lambda m: term(m, log_prob - np.log(0.5)))(jnp.array([mean]))  # ratio 0.5: clipped to 0.8
    assert float(below[0]) == pytest.approx(0.8 * d_kl, rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("m", "case"), [(ppd_mujoco, GAUSSIAN[-1]), (ppd_atari, DISCRETE[-1]), (ppd_gymnax, GAUSSIAN[-1])])
def test_detached_is_the_papers_term_without_the_gradient_through_the_ratio(m, case, direction):
    """The same loss; the gradients differ by that of KL held constant times max(r, 1-ε)."""
    d = load(case)
    t, batch = tables(d), ppd_batch(m, d)
    far = batch._replace(log_probs=batch.log_probs + 50.0)
    kl = m.ppd_loss(outputs(t), t["values"], far, 0.0, 0.2, 0.0, 0.0, direction, "ratio")[1]["teacher_kl"]
    (loss, metrics), papers = jax.value_and_grad(ppd, has_aux=True)(t, m, d, 2.0, direction)
    (same, _), detached = jax.value_and_grad(ppd, has_aux=True)(t, m, d, 2.0, direction, weight="detached")
    assert loss == same
    close(kl, metrics["teacher_kl"])  # it has nothing to do with the ratio

    def through_the_ratio(t):
        pi, fixed = m.distribution(outputs(t)), m.distribution(outputs(tables(d)))
        teacher = m.distribution(teacher_outputs(d))
        kl = teacher.kl_divergence(fixed) if direction == "forward" else fixed.kl_divergence(teacher)
        return 2.0 * (kl * jnp.maximum(jnp.exp(pi.log_prob(d["actions"]) - d["old_logprobs"]), 1.0 - d["clip_coef"])).mean()

    jax.tree.map(lambda a, b, c: close(a, b + c), papers, detached, jax.grad(through_the_ratio)(t) | {"values": jnp.zeros_like(t["values"])})
    assert float(jnp.abs(papers["out"] - detached["out"]).max()) > 1e-3


@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
def test_the_gradient_through_the_ratio_is_zero_in_expectation(kind):
    """Over actions of the policy that acted, where the clip leaves r alone: one state, many actions, float64."""
    m = ppd_mujoco if kind == "gaussian" else ppd_atari
    with jax.enable_x64(True):
        out = (jnp.array([0.3, -0.5]), jnp.array([-0.2, 0.1])) if kind == "gaussian" else jnp.array([0.5, -1.0, 0.2, 0.0])
        taught = (jnp.array([2.0, 1.0]), jnp.array([-1.0, -1.0])) if kind == "gaussian" else jnp.array([3.0, -2.0, 0.0, 0.0])
        actions = m.distribution(out).sample(seed=jax.random.PRNGKey(0), sample_shape=(200_000,))
        log_probs = m.distribution(out).log_prob(actions)
        sample = m.Batch(None, actions, log_probs, jnp.zeros_like(log_probs), jnp.zeros_like(log_probs), jnp.ones_like(log_probs), taught)

        def gradients(weight):
            def term(out, action, log_prob):
                one = sample._replace(actions=action, log_probs=log_prob, advantages=0.0, returns=0.0, weights=1.0)
                return m.ppd_terms(out, jnp.zeros(()), one, 0.2, "forward", weight)["distill_loss"]

            found = jax.vmap(jax.grad(term), (None, 0, 0))(out, actions, log_probs)
            return jnp.concatenate(jax.tree.leaves(found), axis=-1) if kind == "gaussian" else found

        difference = gradients("ratio") - gradients("detached")
        error = difference.std(0) / len(actions) ** 0.5
        assert float(difference.std(0).min()) > 0.1  # it is noise, which grows with the KL divergence,
        assert np.all(np.abs(difference.mean(0)) < 5 * error)  # around 0


@pytest.mark.parametrize(("m", "case"), [(ppd_mujoco, "gaussian/forward/lambda2"), (ppd_atari, "discrete/forward/lambda2")])
def test_phantoms_weigh_nothing_in_any_term(m, case):
    d = load(case)
    keep = np.arange(64) % 3 != 0
    batch = ppd_batch(m, d)
    spoiled = batch._replace(weights=jnp.asarray(keep, jnp.float32), advantages=jnp.where(keep, batch.advantages, 1e3),
                             returns=jnp.where(keep, batch.returns, -1e3), log_probs=jnp.where(keep, batch.log_probs, 5.0))
    kept = jax.tree.map(lambda x: x[keep], batch)
    grad, metrics = jax.grad(ppd, has_aux=True)(tables(d), m, d, 2.0, "forward", spoiled)
    small = tables(d) | {"out": d["student_out"][keep], "values": d["values"][keep]}
    grad_kept, metrics_kept = jax.grad(ppd, has_aux=True)(small, m, d, 2.0, "forward", kept)
    for name in metrics:
        close(metrics[name], metrics_kept[name])
    close(grad["out"][keep], grad_kept["out"])
    if not d["discrete"]:
        close(grad["log_std"], grad_kept["log_std"])
    assert not np.asarray(grad["out"])[~keep].any() and not np.asarray(grad["values"])[~keep].any()


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
@pytest.mark.parametrize("m", [student_distill, ppd_gymnax])
def test_the_loss_of_the_baselines_in_numpy(m, kind, direction):
    """KL - α entropy + c (V - V_teacher)², averaged over the samples that are no phantoms, in float64."""
    d, rng = load(f"{kind}/forward/lambda1"), np.random.default_rng(0)
    weights, teacher_values = rng.integers(0, 2, 64).astype(np.float32), rng.normal(size=64).astype(np.float32)
    given = [m.Batch(None, jnp.asarray(weights), teacher_outputs(d), jnp.asarray(teacher_values))] if m is student_distill else []
    if m is ppd_gymnax:  # there is no phantom
        weights, given = np.ones(64), [teacher_outputs(d), jnp.asarray(teacher_values)]
    loss, metrics = m.distill_loss(outputs(tables(d)), d["values"], *given, 0.1, 0.5, direction)

    x = {k: np.asarray(v, np.float64) for k, v in d.items()}
    if kind == "discrete":
        p, q = log_softmax(x["teacher_out"]), log_softmax(x["student_out"])
        entropy = -(np.exp(q) * q).sum(-1)
        p, q = (p, q) if direction == "forward" else (q, p)
        kl = (np.exp(p) * (p - q)).sum(-1)
    else:
        p, q = [(x[f"{who}_out"], x[f"{who}_log_std"]) for who in ("teacher", "student")]
        entropy = np.full(64, (q[1] + 0.5 * np.log(2 * np.pi * np.e)).sum())
        p, q = (p, q) if direction == "forward" else (q, p)
        kl = (q[1] - p[1] + (np.exp(2 * p[1]) + (p[0] - q[0]) ** 2) / (2 * np.exp(2 * q[1])) - 0.5).sum(-1)
    expected = kl - 0.1 * entropy + 0.5 * (x["values"] - teacher_values) ** 2
    close(loss, (expected * weights).sum() / weights.sum())
    close(metrics["teacher_kl"], (kl * weights).sum() / weights.sum())
