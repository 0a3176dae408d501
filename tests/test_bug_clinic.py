"""The bug clinic: its world against a vessel moved by hand, its register, its arithmetic, what is refused."""

import ast
import inspect

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from conftest import ROOT
from rlhf_course import bug_clinic, ppo
from rlhf_course.bug_clinic import BUGS, DIAGNOSTICS, N_POINTS, WARDS, DockingEnv, condense, features, healthy_spread, name_fault, sick_training, signature, ward_training


def course(level, seed=0):
    """A condensed run of noise around a level."""
    noise = np.random.default_rng(seed).normal(size=(len(DIAGNOSTICS), N_POINTS))
    return {name: (level + 0.1 * row).tolist() for name, row in zip(DIAGNOSTICS, noise)}


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_vessels_move_as_one_moved_by_hand(measured, mode):
    """Each vessel of five, step by step, with Python's own numbers; starts are read from the observations."""
    envs, rng = DockingEnv(5, measured, limit=12, autoreset_mode=mode), np.random.default_rng(1)
    observations, _ = envs.reset(seed=4)
    state = [[float(x), float(v), 0, False] for x, v in observations]
    endings = set()
    for _ in range(150):
        actions = rng.uniform(-2, 2, (5, 1)) if measured else rng.integers(3, size=5)
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        for i, (x, v, age, over) in enumerate(state):
            if over:  # only in next-step mode
                assert rewards[i] == 0 and not terminated[i] and not truncated[i]
                state[i] = [*map(float, observations[i]), 0, False]
                continue
            v += 0.2 * (max(-1.0, min(1.0, float(actions[i, 0]))) if measured else int(actions[i]) - 1)
            x, age = x + 0.2 * v, age + 1
            ending = "left" if abs(x) > 2 else "docked" if abs(x) < 0.2 and abs(v) < 0.4 else "late" if age == 12 else ""
            assert rewards[i] == {"left": -3.0, "docked": 0.0}.get(ending, -0.1)
            assert (terminated[i], truncated[i]) == (ending in ("left", "docked"), ending == "late")
            endings.add(ending)
            same_step = mode == AutoresetMode.SAME_STEP
            seen = infos["final_obs"][i] if ending and same_step else observations[i]
            np.testing.assert_allclose(seen, [x, v], atol=1e-5)
            state[i] = [*map(float, observations[i]), 0, False] if ending and same_step else [x, v, age, bool(ending)]
    assert endings == {"", "left", "docked", "late"}


def test_vessels_with_one_seed_are_the_same():
    """And with another they are not."""
    starts = [DockingEnv(4).reset(seed=seed)[0] for seed in (0, 0, 1)]
    assert (starts[0] == starts[1]).all() and (starts[0] != starts[2]).any()


def test_register_is_complete():
    """At least twelve faults, each with its own words, in a ward that exists, made by something that differs from the real thing."""
    assert len(BUGS) >= 12
    for words in ("fault", "sign", "cure"):
        assert len({getattr(bug, words) for bug in BUGS.values()}) == len(BUGS)
    for name, bug in BUGS.items():
        assert bug.ward in WARDS and bool(bug.settings) != bool(bug.parts), name
        assert set(bug.parts) <= {"update_fn", "rollout_fn", "scaler"}


def test_the_real_code_has_no_flag_for_any_fault():
    """The modules of PPO do not import the clinic, and no name of a fault stands in them."""
    sources = [(ROOT / "rlhf_course" / f"{name}.py").read_text(encoding="utf-8") for name in ("surrogate", "agents", "environments", "ppo")]
    source = "\n".join(sources)
    imported = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    faulty = [name for name, thing in vars(bug_clinic).items() if name.startswith("_") and not name.startswith("__")
              and callable(thing) and getattr(thing, "__module__", "") == bug_clinic.__name__]  # fmt: skip
    assert "bug_clinic" not in str(imported) and len(faulty) >= 12 and not [name for name in faulty if name in source]
    assert not [name for name in inspect.signature(ppo.update).parameters if "bug" in name or "fault" in name]


def test_healthy_mean_has_no_signature():
    """The signature of the healthy mean is 0, and one spread away from it is 1."""
    well = [course(2.0, seed) for seed in range(6)]
    spread = healthy_spread({"a": well, "b": [course(5.0, seed) for seed in range(6, 12)]})
    found = np.array([signature(run, well, spread) for run in well])
    assert np.abs(found.mean(0)).max() < 1e-9 and 0.5 < np.sqrt((found**2).mean()) < 1.5
    higher = {name: [value + (spread[2 * i] if name not in bug_clinic.LOGARITHMIC else 0) for value in well[0][name]] for i, name in enumerate(DIAGNOSTICS)}
    moved = signature(higher, well, spread) - signature(well[0], well, spread)
    assert np.allclose(moved[0], 1) and features(well[0]).shape == (2 * len(DIAGNOSTICS),)


def test_nearest_name_comes_first():
    """Whatever the order of the table."""
    table = {name: np.full(4, size) for name, size in {"far": 50.0, "healthy": 0.0, "near": 2.0}.items()}
    names = [name for name, _ in name_fault(np.full(4, 2.5), table)]
    assert names == ["near", "healthy", "far"] == [name for name, _ in name_fault(np.full(4, 2.5), dict(reversed(table.items())))]
    assert name_fault(table["far"], table)[0] == ("far", 0.0)


def test_runs_that_are_too_short_and_names_that_are_not_there_are_refused():
    """With the function named."""
    rows = [dict.fromkeys(DIAGNOSTICS, float("nan") if i == 0 else 1.0) for i in range(2 * N_POINTS)]
    assert condense(rows)["entropy"] == [1.0] * N_POINTS  # a NaN before the first episode does not spread
    for function, args in ((condense, (rows[:5],)), (healthy_spread, ({"a": [course(1.0)]},)), (sick_training, ("influenza", 0)), (ward_training, ("icu", 0))):
        with pytest.raises(ValueError, match=f"{function.__name__}: "):
            function(*args)
