"""resolve: the workers of a deployment, and what does not fit the model or the machine."""

from __future__ import annotations

import pytest

from xdeepserve.errors import ConfigError
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.deployment_file import parse_deployment
from xdeepserve.launch.plan import ModelShape, counts_of, even_slices, resolve

MOE = ModelShape(name="moe", num_experts=8, has_ffn=True, num_layers=2, hidden_size=8, top_k=2)
ALL_ROUTED = ModelShape(
    name="routed", num_experts=8, has_ffn=False, num_layers=2, hidden_size=8, top_k=2
)
DENSE = ModelShape(name="dense", num_experts=0, has_ffn=True, num_layers=2, hidden_size=8, top_k=0)
CORES = (0, 1, 2, 3)


def test_workers_of_all_roles() -> None:
    text = b"roles: {attention: {count: 2, cores: [[0, 1]]}, ffn: {count: 1}, expert: {count: 3}}"
    plan = resolve(parse_deployment(text), MOE, usable_cores=CORES)
    rows = [(w.title, w.role, w.rank, w.cores, w.experts) for w in plan.workers]
    assert rows == [
        ("xds:dp0", "attention", 0, (0, 1), None),
        ("xds:dp1", "attention", 1, (), None),
        ("xds:ffn0", "ffn", 0, (), None),
        ("xds:expert0", "expert", 0, (), (0, 3)),
        ("xds:expert1", "expert", 1, (), (3, 6)),
        ("xds:expert2", "expert", 2, (), (6, 8)),
    ]
    assert plan.counts() == {"attention": 2, "ffn": 1, "expert": 3}


def test_counts_that_workers_speak_for() -> None:
    assert counts_of(["dp1", "expert0", "expert2", "supervisor", "expertly", "dp²"]) == {
        "attention": 2,
        "expert": 3,
    }
    assert counts_of([]) == {}


def test_slices_may_overlap() -> None:
    text = b"roles: {expert: {count: 2, slices: [[0, 6], [2, 8]]}}"
    plan = resolve(parse_deployment(text), MOE, usable_cores=CORES)
    assert [w.experts for w in plan.workers[1:]] == [(0, 6), (2, 8)]


@pytest.mark.parametrize("num_workers", range(1, 9))
def test_even_slices_cover_all(num_workers: int) -> None:
    slices = even_slices(8, num_workers)
    assert [e for start, stop in slices for e in range(start, stop)] == list(range(8))
    sizes = [stop - start for start, stop in slices]
    assert max(sizes) - min(sizes) <= 1


MISFITS: dict[str, tuple[bytes, ModelShape, str]] = {
    "experts of a dense model": (b"roles: {expert: {count: 1}}", DENSE, "dense is a dense model"),
    "FFN of routed experts alone": (b"roles: {ffn: {count: 1}}", ALL_ROUTED, "no dense MLP"),
    "more workers than experts": (b"roles: {expert: {count: 9}}", MOE, "exceeds the 8 experts"),
    "experts left out": (
        b"roles: {expert: {count: 2, slices: [[0, 3], [5, 8]]}}",
        MOE,
        "leave out experts [3, 4]",
    ),
    "experts beyond the last": (
        b"roles: {expert: {count: 1, slices: [[0, 9]]}}",
        MOE,
        "slices[0]=[0, 9] goes beyond the 8 experts",
    ),
    "too many replicas": (
        b"roles: {expert: {count: 2, replicas: 5}}",
        MOE,
        "replicas=5 besides a slice of 4 exceeds the 8",
    ),
    "cores that are not there": (
        b"roles: {ffn: {count: 1, cores: [[3, 4]]}}",
        MOE,
        "roles.ffn.cores[0] names cores [4]",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfit(name: str) -> None:
    text, shape, part = MISFITS[name]
    with pytest.raises(ConfigError) as caught:
        resolve(parse_deployment(text), shape, usable_cores=CORES)
    assert part in caught.value.message


def test_scaling_drops_what_was_made_for_the_old_count() -> None:
    text = b"roles: {expert: {count: 2, slices: [[0, 5], [5, 8]], replicas: 1}}"
    deployment = parse_deployment(text)
    assert deployment.with_counts({"expert": 2}) == deployment
    three = deployment.with_counts({"expert": 3, "attention": 2})
    assert (three.roles.expert.slices, three.roles.expert.replicas) == ((), 1)
    assert three.roles.attention.count == 2
    assert deployment.with_counts({"expert": 1}).roles.expert.replicas == 0


@pytest.mark.parametrize("counts", [{"experts": 1}, {"attention": 0}, {"ffn": -1}])
def test_counts_that_cannot_be(counts: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Deployment().with_counts(counts)
