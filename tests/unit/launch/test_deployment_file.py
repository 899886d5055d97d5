"""Deployment files: a complete one, every way to be wrong, and flags over files."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from xdeepserve.errors import ConfigError
from xdeepserve.launch import serve
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.deployment_file import MAX_FILE_BYTES, load_deployment, parse_deployment

COMPLETE = b"""
model: smollm2-135m-moe8
precision: {dtype: int8, num_threads: 2}
roles:
  attention: {count: 2, cores: [[0], [1]]}
  ffn: {count: 1}
  expert:
    count: 2
    slices: [[0, 5], [3, 8]]
    replicas: 1
limits: {max_num_seqs: 8, max_num_batched_tokens: 64, prefix_caching: false}
gateway: {port: 9000}
slo: {ttft_ms: 500, tpot_ms: 33.5}
supervision: {heartbeat_interval_s: 1, freeze_timeout_s: 10}
"""


def test_complete_file() -> None:
    deployment = parse_deployment(COMPLETE)
    assert deployment.model == "smollm2-135m-moe8"
    assert deployment.precision.weight_dtype == "int8"
    assert deployment.roles.attention.cores == ((0,), (1,))
    assert deployment.roles.expert.slices == ((0, 5), (3, 8))
    assert deployment.counts() == {"attention": 2, "ffn": 1, "expert": 2}
    assert not deployment.limits.prefix_caching
    assert (deployment.slo.ttft_ms, deployment.slo.tpot_ms) == (500, 33.5)
    assert deployment.gateway.host == "127.0.0.1"


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file must be a mapping, not empty"),
    "a list": (b"- model", "the file must be a mapping, not a list: ['model']"),
    "a list of nothing": (b"- ", "the file must be a mapping, not a list: [None]"),
    "an empty list": (b"[]", "the file must be a mapping, not a list: []"),
    "a number": (b"3.5", "the file must be a mapping, not a number: 3.5"),
    "a word": (b"model", "the file must be a mapping, not text: model"),
    "not YAML": (b"model: [", "not valid YAML"),
    "not text": (b"model: \xff\xfe", "not valid YAML"),
    "a tab": (b"roles:\n\tffn: {}", "not valid YAML"),
    "two documents": (b"model: a\n---\nmodel: b", "not valid YAML"),
    "an object": (b"model: !!python/object:os.system x", "not valid YAML"),
    "an alias": (b"a: &a x\nmodel: *a", "aliases are not allowed"),
    "a repeated key": (b"model: a\nmodel: b", "'model' is repeated"),
    "a repeated key inside": (b"slo: {tpot_ms: 1, tpot_ms: 2}", "'tpot_ms' is repeated"),
    "too deep": (b"model: " + b"[" * 20000, "not valid YAML"),
    "too long": (b"#" * (MAX_FILE_BYTES + 1), "more than 65536 bytes"),
    "an impossible date": (b"model: 2026-99-99", "not valid YAML"),
    "an unknown key": (b"modle: x", "modle is not a known key; did you mean model?"),
    "an unknown role": (b"roles: {experts: {}}", "roles.experts is not a known key; did you mean"),
    "an unknown key of a role": (b"roles: {ffn: {slices: []}}", "roles.ffn.slices is not a known"),
    "a number as key": (b"1: x", "1 is not a known key"),
    "model is a number": (b"model: 7", "model: expected `str`, got `int`"),
    "roles is a list": (
        b"roles: [attention]",
        "roles must be a mapping, not a list: ['attention']",
    ),
    "a role is a number": (b"roles: {ffn: 2}", "roles.ffn must be a mapping, not a number: 2"),
    "a role is null": (b"roles: {ffn: }", "roles.ffn must be a mapping, not empty"),
    "count is text": (b"roles: {ffn: {count: '2'}}", "roles.ffn.count: expected `int`, got `str`"),
    "count is a fraction": (b"roles: {ffn: {count: 1.5}}", "roles.ffn.count: expected `int`"),
    "count is a truth value": (b"roles: {ffn: {count: yes}}", "roles.ffn.count: expected `int`"),
    "count is null": (b"roles: {ffn: {count: }}", "roles.ffn.count: expected `int`, got `null`"),
    "count is negative": (b"roles: {ffn: {count: -1}}", "roles.ffn: count=-1 must be between 0"),
    "count is absurd": (b"roles: {expert: {count: 9999}}", "roles.expert: count=9999 must be"),
    "no DP group": (b"roles: {attention: {count: 0}}", "roles.attention: count=0 must be at least"),
    "cores is flat": (
        b"roles: {ffn: {cores: [1]}}",
        "roles.ffn.cores[0]: expected `array`, got `int`",
    ),
    "a core is text": (b"roles: {ffn: {cores: [[a]]}}", "roles.ffn.cores[0][0]: expected `int`"),
    "a core is negative": (b"roles: {ffn: {cores: [[-1]]}}", "roles.ffn: cores[0]=[-1] must name"),
    "a core twice": (b"roles: {ffn: {cores: [[1, 1]]}}", "cores[0]=[1, 1] must name"),
    "no core": (b"roles: {ffn: {cores: [[]]}}", "cores[0]=[] must name at least one core"),
    "a slice of three": (
        b"roles: {expert: {count: 1, slices: [[0, 1, 2]]}}",
        "roles.expert.slices[0]: expected `array` of length 2",
    ),
    "a slice backwards": (
        b"roles: {expert: {count: 1, slices: [[4, 4]]}}",
        "roles.expert: slices[0]=[4, 4] must be 0 <= start < stop",
    ),
    "too few slices": (
        b"roles: {expert: {count: 2, slices: [[0, 8]]}}",
        "roles.expert: slices lists 1 workers, count=2",
    ),
    "replicas of one": (b"roles: {expert: {count: 1, replicas: 1}}", "needs at least 2 expert"),
    "negative replicas": (b"roles: {expert: {count: 2, replicas: -1}}", "replicas=-1 must not"),
    "unknown dtype": (b"precision: {dtype: int3}", "precision: dtype='int3' must be one of"),
    "a limit out of range": (b"limits: {max_num_seqs: 0}", "limits: max_num_seqs=0 must be at"),
    "a flag is a number": (
        b"limits: {prefix_caching: 1}",
        "prefix_caching: expected `bool`",
    ),
    "a port out of range": (b"gateway: {port: 99999}", "gateway: port=99999 must be between"),
    "an SLO that is no number": (b"slo: {tpot_ms: .nan}", "slo: tpot_ms=nan must be finite"),
    "an endless SLO": (b"slo: {ttft_ms: .inf}", "slo: ttft_ms=inf must be finite"),
    "a negative SLO": (b"slo: {ttft_ms: -1}", "slo: ttft_ms=-1.0 must be finite and >= 0"),
    "a wait of zero": (
        b"supervision: {stop_timeout_s: 0}",
        "supervision: stop_timeout_s=0.0 must be finite and above 0",
    ),
    "a nervous supervisor": (
        b"supervision: {heartbeat_interval_s: 5}",
        "freeze_timeout_s=3.0 must be at least twice heartbeat_interval_s=5",
    ),
    "a hasty supervisor": (
        b"supervision: {busy_timeout_s: 0.1}",
        "supervision: busy_timeout_s=0.1 must be at least twice heartbeat_interval_s=0.25",
    ),
    "busy for less than an exchange": (
        b"roles: {expert: {count: 1}}\nsupervision: {busy_timeout_s: 29.9}",
        "supervision: busy_timeout_s=29.9 must be at least 30 with FFN or expert workers",
    ),
}


def test_a_group_that_asks_nobody_may_be_killed_sooner() -> None:
    deployment = parse_deployment(b"supervision: {busy_timeout_s: 10}")
    assert deployment.supervision.busy_timeout_s == 10.0
    with pytest.raises(ConfigError, match=r"busy_timeout_s=10\.0 must be at least 30"):
        deployment.with_counts({"ffn": 1})


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file(name: str) -> None:
    data, part = MALFORMED[name]
    with pytest.raises(ConfigError) as caught:
        parse_deployment(data)
    assert part in caught.value.message


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    with pytest.raises(ConfigError, match=r"deployment file .*bad.yaml: No such file"):
        load_deployment(path)
    path.write_text("modle: x")
    with pytest.raises(ConfigError, match=r"deployment file .*bad.yaml: modle is not"):
        load_deployment(path)


def parse_serve(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(arguments)


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_bytes(COMPLETE)
    from_file = serve.deployment_from_args(parse_serve("--deployment", str(path)))
    assert from_file == parse_deployment(COMPLETE)
    flags = ["other", "--deployment", str(path), "--dtype", "auto", "--expert", "4", "--port", "0"]
    overridden = serve.deployment_from_args(parse_serve(*flags))
    assert (overridden.model, overridden.gateway.port) == ("other", 0)
    # Also with the value that is the default without a file.
    assert (overridden.precision.dtype, overridden.precision.num_threads) == ("auto", 2)
    assert overridden.counts() == {"attention": 2, "ffn": 1, "expert": 4}
    assert overridden.roles.expert.slices == ()
    assert overridden.limits == from_file.limits


def test_flags_of_experts_and_objectives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_bytes(COMPLETE)
    flags = ["--deployment", str(path), "--replicas", "2", "--rebalance-interval-s", "0"]
    flags += ["--tpot-ms", "20"]
    changed = serve.deployment_from_args(parse_serve(*flags))
    expert = changed.roles.expert
    assert (expert.replicas, expert.rebalance_interval_s, len(expert.slices)) == (2, 0.0, 2)
    assert (changed.slo.ttft_ms, changed.slo.tpot_ms) == (500, 20)
    assert caplog.messages == []
    without_file = serve.deployment_from_args(parse_serve("m", "--expert", "2", "--replicas", "1"))
    assert without_file.roles.expert.replicas == 1
    with pytest.raises(ConfigError, match="replicas=1 needs at least 2 expert workers"):
        serve.deployment_from_args(parse_serve("m", "--expert", "1", "--replicas", "1"))


def test_slices_that_a_flag_overrides_are_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_bytes(COMPLETE)
    serve.deployment_from_args(parse_serve("--deployment", str(path), "--expert", "4"))
    assert caplog.messages == [
        "--expert 4 overrides 2 slices of the deployment file; experts are split evenly"
    ]


@pytest.mark.parametrize(
    ("text", "flags", "pin"),
    [
        (b"", [], True),
        (b"pin: false", [], False),
        (b"pin: false", ["--pin"], True),
        (b"pin: true", ["--no-pin"], False),
    ],
)
def test_pinning_is_the_default_and_can_be_switched(
    text: bytes, flags: list[str], pin: bool, tmp_path: Path
) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_bytes(text or b"{}")
    args = parse_serve("model", "--deployment", str(path), *flags)
    assert serve.deployment_from_args(args).pin is pin


def test_a_model_must_be_named() -> None:
    with pytest.raises(ConfigError, match="no model is named"):
        serve.deployment_from_args(parse_serve("--attention", "2"))


def _documented_fields(kind: type[Any], path: str) -> list[tuple[str, str]]:
    hints = get_type_hints(kind)
    found = []
    for field in fields(kind):
        where = f"{path}{field.name}"
        found.append((where, field.metadata.get("doc", "")))
        if is_dataclass(hints[field.name]):
            found += _documented_fields(hints[field.name], f"{where}.")
    return found


PAGE = Path(__file__).parents[3] / "docs" / "deployment.md"


def _documented_defaults() -> list[str]:
    """Each key of the page with its default, as a deployment file."""
    files = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        path = section.partition("\n")[0].strip("`").split(".")
        for key, default in re.findall(r"^\| `(\w+)` \| `(.*)` \|", section, re.MULTILINE):
            files.append(": {".join([*path, f"{key}: {default}"]) + "}" * len(path))
    return files


@pytest.mark.parametrize("text", _documented_defaults())
def test_the_documented_default_is_a_value_of_the_file_and_the_default(text: str) -> None:
    assert parse_deployment(text.encode()) == Deployment()


@pytest.mark.parametrize(
    ("text", "value"), [("off", "off"), ("ngram", "ngram"), ("mtp", "mtp"), ("'off'", "off")]
)
def test_a_word_is_text_also_where_yaml_sees_a_truth_value(text: str, value: str) -> None:
    assert parse_deployment(f"limits: {{speculation: {text}}}".encode()).limits.speculation == value


@pytest.mark.parametrize("text", ["on", "yes", "tRUE", "trueish"])
def test_truth_values_are_true_and_false_alone(text: str) -> None:
    assert not parse_deployment(b"pin: false").pin
    with pytest.raises(ConfigError, match="pin: expected `bool`, got `str`"):
        parse_deployment(f"pin: {text}".encode())


def test_every_key_is_documented() -> None:
    documented = _documented_fields(Deployment, "")
    assert [where for where, doc in documented if not doc] == []
    page = PAGE.read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page, re.MULTILINE)
    sections = {where.rpartition(".")[0] for where, _ in documented}
    leaves = [(where, doc) for where, doc in documented if where not in sections and "." in where]
    assert [where for where, doc in leaves if (where.split(".")[-1], doc) not in rows] == []


@pytest.mark.parametrize("role", ["attention", "ffn", "expert"])
def test_a_wrong_count_names_its_role(role: str) -> None:
    with pytest.raises(ConfigError, match=f"^roles.{role}: count=-1 must be"):
        Deployment().with_counts({role: -1})
