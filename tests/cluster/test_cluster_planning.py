"""What is checked before a cluster is started, and how files become items."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.cluster import ClusterError, connection, detect_on_cluster
from anchorline.cluster.connection import check_address, share_out, why_dead
from anchorline.cluster.run import make_items, plan_files
from anchorline.runtime.io.errors import ArtefactError, DataError, SettingsError
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.source import Item, plan


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9), st.integers(1, 20))
def test_every_file_is_in_one_item_in_order(kinds, workers, most):
    files = [Item(Path(f"{index}"), is_video, None) for index, is_video in enumerate(kinds)]
    items = make_items(files, workers, most)
    assert [path for item in items for path in item.paths] == [str(file.path) for file in files]
    for item in items:
        assert int(item.paths[0]) == item.first
        assert all(kinds[item.first + index] == item.is_video for index in range(len(item.paths)))
        assert len(item.paths) <= (1 if item.is_video else most)
    for before, after in itertools.pairwise(items):  # groups are full, but for the ends
        if not before.is_video and not after.is_video:
            assert len(before.paths) >= len(after.paths)


def test_few_images_are_shared_out():
    files = [Item(Path(f"{index}"), False, None) for index in range(20)]
    assert [len(item.paths) for item in make_items(files, workers=2, most_images=16)] == [3] * 6 + [2]


def test_files_are_those_of_the_local_run_in_its_order(files, tmp_path):
    (local,) = plan(files, tmp_path / "out")
    assert plan_files(files, tmp_path / "out", 1) == list(local.items)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("0", "0: no file"),
        ("rtsp://user:secret@camera/live", "camera/live: no file"),
        ("http://server/clip.mp4", "no file"),
        ("cam1=clip.mp4", "give clip.mp4 without a name"),
    ],
)
def test_what_is_no_file(source, message):
    with pytest.raises(SettingsError, match=message) as raised:
        plan_files([source], None, 1)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("sources", "settings", "kind", "message"),
    [
        ([], {}, SettingsError, "no sources given"),
        (["none.png"], {}, DataError, "none.png: no such file or folder"),
        (["a.png"], {"stride": 0}, SettingsError, "stride is 0"),
        (["a.png"], {"threads": 0}, SettingsError, "threads is 0"),
        (["a.png"], {"workers": 0}, SettingsError, "workers is 0"),
        (["a.png"], {"tries": 1.5}, SettingsError, "tries is 1.5"),
        (["a.png"], {"images_per_item": True}, SettingsError, "images_per_item is True"),
        (["a.png"], {"shown_score": 2.0}, SettingsError, "shown_score is 2.0"),
        (["a.png"], {"decoder": "magic"}, SettingsError, "decoder is 'magic'"),
        (["a.png"], {"provider": "magic"}, SettingsError, "provider is 'magic'; expected one of auto, cpu"),
        (["a.png"], {"address": "ray://host:1"}, SettingsError, "Ray Client is not supported"),
        (["a.png"], {"address": "host"}, SettingsError, "expected local, auto or the HOST:PORT"),
        (["a.png"], {"jsonl": "a.png"}, SettingsError, "a.png is a source"),
        (["a.png"], {"save": "a.png"}, SettingsError, "would overwrite the source"),
        (["a.png"], {"model": "none.onnx"}, ArtefactError, "none.onnx: no such file"),
        (["a.png"], {"model": "a.safetensors"}, ArtefactError, "first anchorline export"),
    ],
)
def test_mistakes_are_found_before_a_cluster_is_started(
    sources, settings, kind, message, model, write_picture, tmp_path, monkeypatch
):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "a.png", 100)

    def start(*arguments):
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(connection, "_join", start)
    names = ("address", "workers", "tries", "images_per_item")
    own = {"address": "local", **{name: settings.pop(name) for name in names if name in settings}}
    model = settings.pop("model", model)
    with pytest.raises(kind, match=message):
        detect_on_cluster(sources, model, DetectOptions(**settings), **own)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"pip install 'anchorline\[ray\]'"):
        check_address("local")


def test_a_local_cluster_is_on_the_loopback_address():
    """Which Ray decides as it is imported, by the check of the address."""
    pytest.importorskip("ray")
    program = """
from anchorline.cluster.connection import check_address
check_address("local")
import ray
print(ray.util.get_node_ip_address())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout == "127.0.0.1\n", done.stderr


def test_nobody_answers():
    with pytest.raises(ClusterError, match=r"--ray 127\.0\.0\.1:9: nobody answers there"):
        connection._join(None, "127.0.0.1:9", 1)


@pytest.mark.parametrize(("gone", "named"), [(0, "its head"), (1, "Ray's process on this machine")])
def test_a_head_and_a_raylet_that_do_not_answer_any_more(monkeypatch, gone, named):
    """Real connections; for what Ray does meanwhile see test_cluster_on_ray.py."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    head, raylet = (each.getsockname()[1] for each in listening)
    own = {"NodeID": "b", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": raylet}
    ray = SimpleNamespace(
        get_runtime_context=lambda: SimpleNamespace(gcs_address=f"127.0.0.1:{head}", get_node_id=lambda: "b"),
        nodes=lambda: [{**own, "NodeID": "a", "NodeManagerPort": 9}, own],
    )
    now = 0.0
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: now))
    pulse = connection.Pulse(ray)

    def live(seconds: int) -> None:
        nonlocal now
        for _ in range(4 * seconds):
            now += 0.25
            pulse.check()

    with contextlib.ExitStack() as stack:
        for each in listening:
            stack.enter_context(each)
        live(20)
        place = listening[gone].getsockname()
        listening[gone].close()
        live(2)
        with socket.create_server(place):  # it was away for a moment
            live(10)
        live(2)
        with pytest.raises(ClusterError, match=f"the cluster is lost: {named} .*{place[1]}.* refused"):
            live(10)


def test_what_ray_prints_stays_out_of_the_results(capsys):
    with contextlib.redirect_stdout(connection._WithoutRay(sys.stdout)):
        for name in ("ray_listen_error_messages", "another"):
            thread = threading.Thread(target=print, args=(name,), name=name)
            thread.start()
            thread.join()
        print("mine")
    assert capsys.readouterr().out == "another\nmine\n"


PAGE = """The actor died unexpectedly before finishing this task.
\tclass_name: DetectionWorker
The actor is dead because {}. Some common causes include: (1) the process was killed by the OOM killer \
due to high memory usage, (2) ray stop --force was called. Consider uninformed kernel OOM killing."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PAGE.format("its worker process has died. Worker exit type: SYSTEM_ERROR"), "its process ended"),
        (PAGE.format("its node has died. Node Id: 12ab"), "its machine is lost"),
        ("Task was killed due to the node running low on memory.\nMemory on the node", "out of memory"),
        (
            "The actor died because of an error raised in its creation task\n  File x.py\n"
            "ModuleNotFoundError: No module named 'anchorline'\n",
            "ModuleNotFoundError: No module named 'anchorline'",
        ),
    ],
)
def test_why_a_worker_died(text, reason):
    assert why_dead(RuntimeError(text)) == reason


def nodes(*sizes):
    """As Ray tells of machines with so many (CPUs, GPUs), and of one that is lost."""
    alive = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in sizes]
    return [
        *alive,
        {"Alive": True, "Resources": {}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]


def test_what_a_worker_takes_and_how_many_there_are():
    without_gpus = nodes((8.0, 0.0), (3.0, 0.0))
    assert share_out(without_gpus, "auto", None) == (3, 0, 3)  # so that no machine is left out
    assert share_out(without_gpus, "cpu", 8) == (8, 0, 1)
    with pytest.raises(SettingsError, match=r"a worker needs 9 CPUs, .* has 8; lower --threads"):
        share_out(without_gpus, "cpu", 9)
    with pytest.raises(SettingsError, match="provider is 'cuda', but the cluster offers no GPU"):
        share_out(without_gpus, "cuda", None)
    with_gpus = nodes((16.0, 4.0), (16.0, 0.0))
    assert share_out(with_gpus, "auto", None) == (1, 1, 4)
    assert share_out(with_gpus, "auto", 8) == (8, 1, 2)
    assert share_out(with_gpus, "cpu", None) == (4, 0, 8)
