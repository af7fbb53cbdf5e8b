"""What the plugin reads from OpenRLHF's command line, compared with OpenRLHF's own parser."""

from __future__ import annotations

from pathlib import Path
from subprocess import list2cmdline
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vllm import SamplingParams

from gymlink.config import load_settings
from gymlink.errors import ConfigError
from gymlink.types import Sampling
from gymlink_openrlhf import options
from gymlink_openrlhf.options import (
    Options,
    Penalties,
    command_line,
    one_branch,
    read_options,
    sampling_of,
    split_entrypoint,
)
from openrlhf_flags import parsed, parser

START = ["/usr/bin/python3", "-m", "openrlhf.cli.train_ppo_ray"]
"""How the command line begins, which Ray tells whole."""


def test_without_flags_the_defaults_are_openrlhfs() -> None:
    own, theirs = vars(options._parser().parse_args([])), parsed([])
    assert own == {name: pytest.approx(theirs[name]) for name in own}
    assert own.keys() <= theirs.keys()


def test_the_types_are_openrlhfs() -> None:
    theirs = {action.dest: action for action in parser()._actions}
    for action in options._parser()._actions:
        assert (action.type or str) == (theirs[action.dest].type or str), action.dest
        assert action.nargs == theirs[action.dest].nargs, action.dest


def test_no_flag_of_openrlhfs_is_taken_for_one_of_these() -> None:
    """argparse takes the beginning of a flag for the flag: none that is read begins with another one's whole name."""
    theirs = {name for action in parser()._actions for name in action.option_strings}
    read = {name for action in options._parser()._actions for name in action.option_strings}
    assert [(name, other) for name in read for other in theirs - read if name.startswith(other)] == []


FLAGS = {
    "--algo.advantage.estimator": "group_norm",
    "--rollout.batch_size": "8",
    "--rollout.n_samples_per_prompt": "4",
    "--rollout.max_new_tokens": "100",
    "--reward.overlong_buffer_len": "20",
    "--reward.overlong_penalty_factor": "0.5",
    "--reward.stop_properly_penalty_coef": "-0.5",
}


def given_as(joined: bool, shortened: int = 0) -> list[str]:
    names = {name[: len(name) - shortened]: value for name, value in FLAGS.items()}
    if joined:
        return [f"{name}={value}" for name, value in names.items()]
    return [one for pair in names.items() for one in pair]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("shortened", [0, 2])
def test_flags_are_read_as_openrlhf_reads_them(joined: bool, shortened: int) -> None:
    arguments = [*given_as(joined, shortened), "--algo.dynamic_filtering_enable", "--algo.dynamic_filtering_range"]
    arguments += ["-0.5", "0.9"]
    theirs = parsed(arguments)
    read = read_options([*START, *arguments, "--actor.adam.lr", "1e-6", "--no_such_flag", ""])
    assert read == Options("group_norm", 8, 4, (-0.5, 0.9), Penalties(20.0, 0.5, -0.5, 100))
    assert read.batch == 32
    assert (read.estimator, read.prompts, read.siblings) == (
        theirs["algo.advantage.estimator"],
        theirs["rollout.batch_size"],
        theirs["rollout.n_samples_per_prompt"],
    )
    assert list(read.filtering or ()) == theirs["algo.dynamic_filtering_range"]


def test_a_flag_given_twice_counts_as_given_last() -> None:
    arguments = ["--rollout.batch_size", "8", "--rollout.batch_size", "16"]
    assert read_options(arguments).prompts == parsed(arguments)["rollout.batch_size"] == 16


def test_nothing_known_is_openrlhfs_default() -> None:
    assert read_options([]) == Options(penalties=Penalties(max_new_tokens=2048))
    assert not read_options([]).penalties.any


def test_the_overlong_penalty_counts_from_the_context_where_a_turn_has_no_limit() -> None:
    assert read_options(["--data.max_len", "99"]).penalties.max_new_tokens == 99
    both = ["--data.max_len", "99", "--rollout.max_new_tokens", "50"]
    assert read_options(both).penalties.max_new_tokens == 50


def test_a_range_without_filtering_filters_nothing() -> None:
    assert read_options(["--algo.dynamic_filtering_range", "0.1", "0.9"]).filtering is None
    assert read_options(["--algo.dynamic_filtering_enable"]).filtering == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.max_images_per_prompt", "2"], r"--data\.max_images_per_prompt is 2, .* text only"),
        (
            ["--rollout.batch_size", "many"],
            r"OpenRLHF's command line: .*--rollout\.batch_size: invalid int value: 'many'",
        ),
        (["--algo.dynamic_filtering_range", "1"], r"--algo\.dynamic_filtering_range: expected 2 arguments"),
        (["--reward.remote_url", "http://judge"], r"--reward\.remote_url is 'http://judge', .* the reward is Gym's"),
        (["--reward.model_name_or_path", "judge"], r"--reward\.model_name_or_path is 'judge', .* the reward is Gym's"),
    ],
)
def test_what_cannot_work_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_options(arguments)


words = st.text(st.sampled_from("ab'\"{}:,-=. \t"), max_size=8)


@given(st.lists(words, max_size=5))
@example(["--x", '{"a": "it\'s"}', "don't", "", "a b", '"'])
def test_a_command_line_is_split_as_ray_has_joined_it(arguments: list[str]) -> None:
    assert split_entrypoint(list2cmdline(arguments)) == arguments


def test_the_command_line_is_that_of_this_ray_job(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        def get_job_id(self) -> str:
            return "02000000"

    arguments = [*START, "--train.agent_func_path", "a b.py", "--ckpt.path", "o'clock", *given_as(joined=False)]
    known = [
        {"JobID": "01000000", "Entrypoint": "python --rollout.batch_size 1"},
        {"JobID": "02000000", "Entrypoint": list2cmdline(arguments)},
    ]
    monkeypatch.setattr("ray.get_runtime_context", Context)
    monkeypatch.setattr("ray._private.state.jobs", lambda: known)
    assert command_line() == arguments
    monkeypatch.setattr("ray._private.state.jobs", lambda: known[:1])
    with pytest.raises(ConfigError, match=r"no --train.agent_func.*: ''"):
        command_line()
    # Started by a program of one's own: all flags would be taken for OpenRLHF's defaults.
    monkeypatch.setattr("ray._private.state.jobs", lambda: [{**known[1], "Entrypoint": "python mine.py"}])
    with pytest.raises(ConfigError, match=r"no --train.agent_func.*: 'python mine.py'"):
        command_line()


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    def load(alignment: str = "") -> Any:
        path = tmp_path / "gym.yaml"
        path.write_text(f"gym: {{config_paths: [a.yaml]}}\n{alignment}")
        return load_settings(path)

    return load


def test_a_rollout_is_one_branch(settings: Any) -> None:
    """By default all branches of a rewritten history are trained, and OpenRLHF takes one sample of a rollout."""
    by_default = settings()
    assert by_default.alignment.on_history_rewrite == "fork"
    made = one_branch(by_default)
    assert made.alignment.on_history_rewrite == "last"
    assert made.alignment.model_copy(update={"on_history_rewrite": "fork"}) == by_default.alignment
    assert made.gym == by_default.gym
    assert one_branch(made) == made


@pytest.mark.parametrize("wanted", ["last", "mask"])
def test_what_gives_one_branch_is_left_as_it_is(settings: Any, wanted: str) -> None:
    told = settings(f"alignment: {{on_history_rewrite: {wanted}}}")
    assert one_branch(told) is told


def test_every_branch_cannot_be_had(settings: Any) -> None:
    with pytest.raises(ConfigError, match=r"on_history_rewrite is 'fork'.* one sample for each rollout.* 'last'"):
        one_branch(settings("alignment: {on_history_rewrite: fork}"))


def test_how_openrlhf_asks_for_sampling() -> None:
    """As `SamplesGenerator._dispatch_prompts_to_vllm` makes its parameters."""
    asked = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=-1, max_tokens=5, min_tokens=1, skip_special_tokens=False, logprobs=1
    )
    assert sampling_of(asked) == Sampling(0.7, 0.9, 0, 0.0, 5)
    assert sampling_of(SamplingParams(top_k=20, max_tokens=None)) == Sampling(top_k=20, max_tokens=None)
