"""How large a collection's pools of actors may be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data
import yaml

from coin_ray.config import PipelineConfig
from coin_ray.config.presets import PRESETS
from coin_ray.errors import ConfigError
from coin_ray.stages.collecting import pools
from coin_ray.stages.common.blocks import dataset_from_table

TOP = Path(__file__).parents[2]


def make_config(rate: float = 60.0, **options: Any) -> PipelineConfig:
    preset = PRESETS["demo"]()
    return replace(
        preset,
        cloud=replace(preset.cloud, rate=rate, in_flight=1000),
        collect=replace(preset.collect, **options),
    )


@pytest.fixture
def cluster_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cluster of two CPUs today; what may join is written into the file."""
    file = tmp_path / "ray_bootstrap_config.yaml"
    monkeypatch.setattr(pools, "CLUSTER_FILE", str(file))
    monkeypatch.setattr(pools, "on_cluster", lambda: True)
    monkeypatch.setattr(pools, "cluster_cpus", lambda: 2)
    return file


@pytest.mark.parametrize(
    ("name", "cpus"),
    [
        ("cluster.yaml", 32),
        ("deploy/cluster-gcp.yaml", 32),
        ("deploy/cluster-onprem.yaml", None),
    ],
)
def test_nodes_with_gpus_do_not_count(name: str, cpus: float | None) -> None:
    assert pools.potential_cpus(yaml.safe_load((TOP / name).read_text())) == cpus


def test_the_head_and_the_largest_number_of_workers_count() -> None:
    node_types = {
        "head": {"resources": {"CPU": 4}, "max_workers": 3},
        "small": {"resources": {"CPU": 2}, "max_workers": 5},
    }
    cluster = {"head_node_type": "head", "available_node_types": node_types}
    assert pools.potential_cpus(cluster) == 4 + 2 * 5
    assert pools.potential_cpus({}) is None


@pytest.mark.parametrize(
    ("options", "labelers"),
    [
        ({}, 31),
        ({"labelers": 40}, 40),
        ({"labeler_gpus": 0.5}, 1),
        ({"labeler_gpus": 1.0, "labelers": 3}, 3),
        ({"labeler": "none"}, 1),
        ({"rate": 6000.0}, 32 - 16 - 1),
    ],
)
def test_labelers_on_a_cluster_that_starts_nodes(
    cluster_file: Path, options: dict[str, Any], labelers: int
) -> None:
    """Nodes of the type ``train``, with GPUs, are not started for them."""
    cluster_file.write_text((TOP / "cluster.yaml").read_text())
    assert pools.count_labelers(make_config(**options)) == labelers


def test_labelers_on_a_cluster_that_nodes_join_by_hand(cluster_file: Path) -> None:
    assert pools.count_labelers(make_config()) is None
    assert pools.count_labelers(make_config(labelers=4)) == 4
    assert pools.most_cloud_actors(make_config(rate=1e6)) == pools.ACTORS_MAX


def test_nodes_of_today_count_where_the_file_names_fewer(cluster_file: Path) -> None:
    node_types = {"head": {"resources": {"CPU": 0}, "max_workers": 0}}
    cluster_file.write_text(
        json.dumps({"head_node_type": "head", "available_node_types": node_types})
    )
    assert pools.most_cpus() == 2


def test_one_machine_keeps_a_cpu_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "on_cluster", lambda: False)
    monkeypatch.setattr(pools, "cluster_cpus", lambda: 6)
    assert pools.count_labelers(make_config()) == 5
    assert pools.cloud_actor_cpus(make_config(rate=6000.0)) == 0


def test_several_cloud_actors_spread_over_the_nodes(cluster_file: Path) -> None:
    """A single one reserves no CPU, nor do those that a setting asks for."""
    cluster_file.write_text((TOP / "cluster.yaml").read_text())
    assert pools.most_cloud_actors(make_config(rate=600.0)) == 2
    assert pools.count_cloud_actors(make_config(rate=600.0), cpus=2) == 1
    assert pools.cloud_actor_cpus(make_config(rate=600.0)) == 1
    assert pools.cloud_actor_cpus(make_config(rate=60.0)) == 0
    assert pools.cloud_actor_cpus(make_config(rate=600.0, actors=3)) == 0


@pytest.mark.parametrize("number", [0, -1])
def test_no_labelers_at_all_are_refused(number: int) -> None:
    with pytest.raises(
        ConfigError, match=r"collect\.labelers must be positive, or auto"
    ):
        make_config(labelers=number)


@pytest.mark.parametrize(
    ("rows", "num_blocks", "sizes"),
    [(7, 3, [3, 3, 1]), (6, 3, [2, 2, 2]), (2, 5, [1, 1]), (0, 1, [0])],
)
def test_blocks_are_cut_in_this_process(
    monkeypatch: pytest.MonkeyPatch, rows: int, num_blocks: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(ray.data, "from_blocks", lambda blocks: blocks)
    blocks: Any = dataset_from_table(pa.table({"n": range(rows)}), num_blocks)
    assert [block.num_rows for block in blocks] == sizes
    assert pa.concat_tables(blocks)["n"].to_pylist() == list(range(rows))
