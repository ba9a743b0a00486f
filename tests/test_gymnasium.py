"""The MuJoCo tasks are Gymnasium's: from one state, the same actions give the same observations, rewards and ends."""

import gymnasium
import numpy as np
import pytest

import ppd_mujoco
import train_teacher

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")  # v4: the paper's
HIDDEN = {"Ant-v4": 2, "HalfCheetah-v4": 1, "Hopper-v4": 1, "Humanoid-v4": 2, "Swimmer-v4": 2}  # positions not observed
TOLERANCE = {"Ant-v4": 1e-2, "Humanoid-v4": 1e-3}  # contacts: their solvers are of different versions of MuJoCo


def both(m, env_id, contact_forces=True):
    """Our environment and Gymnasium's in the same state."""
    if m is ppd_mujoco:
        envs = m.make_envs(env_id, 1, 3, {"contact_forces": contact_forces})
    else:
        envs = m.make_envs(env_id, 1, 3, {"contact_forces": contact_forces}, "training")
    theirs = gymnasium.make(env_id).unwrapped
    theirs.reset(seed=0)
    seen, hidden, sizes = envs.reset()[0][0], HIDDEN[env_id], (theirs.model.nq, theirs.model.nv)
    theirs.set_state(np.append(np.zeros(hidden), seen[:sizes[0] - hidden]), seen[sizes[0] - hidden:sum(sizes) - hidden])
    return envs, theirs


@pytest.mark.parametrize("m", [ppd_mujoco, train_teacher])
@pytest.mark.parametrize("env_id", HIDDEN)
def test_a_task_is_gymnasium_s(m, env_id):
    envs, theirs = both(m, env_id)
    rng, tolerance, ended, forces = np.random.default_rng(0), TOLERANCE.get(env_id, 1e-6), False, 0.0
    for t in range(10 if env_id == "Ant-v4" else 20):  # what differs grows, fastest there
        action = rng.uniform(-1.5, 1.5, theirs.action_space.shape).astype(np.float32)  # beyond the bounds: clipped
        clipped = np.clip(action, theirs.action_space.low, theirs.action_space.high)
        ours = m.step(envs, action[None])
        observation, reward, ended, _, _ = theirs.step(clipped)
        np.testing.assert_allclose(ours[0][0], observation, atol=tolerance, rtol=tolerance, err_msg=f"step {t}")
        np.testing.assert_allclose(ours[1][0], reward, atol=tolerance, rtol=tolerance, err_msg=f"step {t}")
        assert ours[2][0] == ended
        forces = max(forces, np.abs(observation[-84:]).max()) if env_id == "Humanoid-v4" else np.inf
        if ended:
            break
    assert t >= 9 and forces > 100  # the feet of Humanoid touched the ground


@pytest.mark.parametrize("m", [ppd_mujoco, train_teacher])
def test_humanoid_without_contact_forces_is_the_same_but_for_zeros(m):
    envs, theirs = both(m, "Humanoid-v4", contact_forces=False)
    forces = 0.0
    for _ in range(15):
        ours = m.step(envs, np.zeros((1, 17)))[0][0]
        observation = theirs.step(np.zeros(17))[0]
        np.testing.assert_allclose(ours[:-84], observation[:-84], atol=1e-3, rtol=1e-3)
        assert not ours[-84:].any()
        forces = max(forces, np.abs(observation[-84:]).max())
    assert forces > 100
