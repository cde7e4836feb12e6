"""bench/gpu/benchmark.py as far as it can be tested without a GPU: rows, limits, results, and what a lost GPU costs."""

import json
from types import SimpleNamespace

import oracle
import pytest
import torch

from bench import peers
from bench.gpu import benchmark, predictions
from bench.gpu import context as gpu_context
from bench.gpu import limits as gpu_limits
from bench.gpu import peers as gpu_peers
from bench.gpu import rows as gpu_rows
from bench.harness import machine, report
from emc2_kernels.losses import NTXentLoss

CPU = torch.device("cpu")


def test_a_rehearsal_runs_every_row_and_claims_nothing(tmp_path, capsys):
    target = tmp_path / "sub" / "out.json"
    assert benchmark.main(["--rehearse", "--backends", "reference", "--json", str(target)]) == 0
    results = json.loads(target.read_text())
    assert list(results) == ["schema", "command", "machine", "backends", "settings", "limits", "rows", "goals"]
    assert str(tmp_path) not in target.read_text() and results["settings"]["rehearsal"] is True
    assert {row["name"] for row in results["rows"]} == set(gpu_rows.ROWS)
    assert [row.get("error") for row in results["rows"]] == [None] * len(results["rows"])
    for row in results["rows"]:
        for goal in row["goals"]:
            assert goal["met"] is None and goal["lower_quartile"] <= goal["value"] <= goal["upper_quartile"]  # exact
        for time_ms in row["times_ms"].values():
            assert 0 < time_ms["lower_quartile"] <= time_ms["median"] <= time_ms["upper_quartile"]  # exact
    held = {
        goal["quantity"]: goal["goal"] for row in results["rows"] for goal in row["goals"] if row["name"] == "split"
    }
    assert held == {"bandwidth of keys / copy bandwidth": ">= 0.5", "time / torch.mm": None}
    assert results["goals"] == {"met": 0, "missed": 0, "failed_rows": 0}
    printed = capsys.readouterr().out
    assert "MISSED" not in printed and all(name in printed for name in gpu_rows.ROWS)


def test_every_row_of_the_headline_is_read_beside_limits_and_predictions(tmp_path, capsys):
    target = tmp_path / "out.json"
    assert benchmark.main(["--rehearse", "--headline", "--backends", "reference", "--json", str(target)]) == 0
    results, printed = json.loads(target.read_text()), capsys.readouterr().out
    assert [(row["name"], row.get("error")) for row in results["rows"]] == [(name, None) for name in gpu_rows.HEADLINE]
    for row in results["rows"]:
        assert row["readings"], row["name"]
        for reading in row["readings"]:
            limit = reading["limits"][reading["binds"]]
            assert limit == max(reading["limits"].values()) > 0
            in_ms = reading["measured"] / (1000 if reading["quantity"].endswith("us") else 1)
            assert reading["time / limit"] == pytest.approx(in_ms / limit)
            assert reading["lower_quartile"] <= reading["measured"] <= reading["upper_quartile"]  # exact
        foreseen = {quantity.split(" [")[0] for quantity in predictions.PREDICTED[row["name"]]}
        assert foreseen <= {reading["quantity"] for reading in row["readings"]}
        assert not {"naive", "column loop", "streaming NT-Xent"} & row["times_ms"].keys()
    by_name = {row["name"]: row for row in results["rows"]}
    sweep, loss = by_name["sweep-ids-128"]["readings"][0], by_name["loss-32"]["readings"][1]
    low, high = predictions.PREDICTED["sweep-ids-128"]["time, ms"]
    assert sweep["predicted"] == {"low": low, "high": high, "for": "H100", "for_this_card": False}
    assert list(sweep["limits"]) == ["tensor cores", "memory", "L2"] and list(loss["limits"]) == ["launch, replayed"]
    assert by_name["sweep-ids-128"]["sizes"]["ids"] and not by_name["sweep-128"]["sizes"]["ids"]
    assert len(by_name["uniform"]["sizes"]["N"]) == 1
    gradient = by_name["lse-backward-128"]
    assert gradient["times_ms"]["backward"]["median"] == pytest.approx(2 * gradient["readings"][0]["measured"])
    assert f"{low:g} to {high:g} for an H100" in printed and "launch, replayed" in printed
    assert results["limits"].keys() == {
        "tensor cores", "memory", "L2", "gather", "clock",
        "launch, called, 1", "launch, replayed, 1", "launch, called, 6", "launch, replayed, 6",
    }  # fmt: skip
    assert all(limit["value"] > 0 and limit["how"] for limit in results["limits"].values())


def test_warm_calls_everything_once_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(machine, "describe", None)  # programs that tell of the machine are not run
    words = ["--rehearse", "--headline", "--warm", "--backends", "reference"]
    assert benchmark.main([*words, "--json", str(tmp_path / "x.json")]) == 0
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(gpu_rows.HEADLINE) and all(line.endswith("done") for line in printed)
    calls = []
    context = gpu_context.Context(CPU, ["a"], rehearsal=True, warm=True)
    measured = context.measure({"first": lambda: calls.append(1), "second": lambda: calls.append(2)})
    assert calls == [1, 2] and {name: len(seconds) for name, seconds in measured.seconds.items()} == {
        "first": 1, "second": 1,
    }  # fmt: skip
    sizes = gpu_context.Context(CPU, []), gpu_context.Context(CPU, [], warm=True), context
    assert [one.size(1000, 10, 100) for one in sizes] == [1000, 100, 10] and sizes[1].size(1000, 10) == 1000


def test_rows_with_ids_give_them_and_the_others_do_not(monkeypatch):
    given = []

    class Step(peers.MHStep):
        def __init__(self, *arguments, ids):
            super().__init__(*arguments, ids=ids)
            given.append(ids and set(ids))

    monkeypatch.setattr(gpu_rows, "MHStep", Step)
    context = gpu_context.Context(CPU, ["reference"], rehearsal=True, headline=True, warm=True)
    for name in ("sweep-512", "sweep-ids-512", "sweep-128", "sweep-ids-128"):
        gpu_rows.ROWS[name](context, "reference")
    ids = {"chain_ids", "query_ids", "key_ids", "key_labels"}
    assert given == [None, ids, None, ids]


def test_the_headline_is_measured_in_fewer_rounds(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_context, "interleave", lambda calls, rounds, **pace: asked.append((rounds, pace)))
    for words in ({}, {"headline": True}, {"quick": True}, {"headline": True, "quick": True}, {"rehearsal": True}):
        gpu_context.Context(CPU, [], **words).measure({})
    assert [rounds for rounds, _ in asked] == [15, 9, 7, 7, 3]
    assert [pace["budget_seconds"] for _, pace in asked] == [0.6, 0.6, 0.25, 0.25, 0.05]


def test_warm_stops_at_the_budget_and_at_a_lost_gpu(monkeypatch):
    ran = []
    monkeypatch.setattr(benchmark, "ROWS", {"row": lambda context, backend: ran.append(backend) or gpu_context.Row({})})
    context = gpu_context.Context(CPU, ["a", "b"], rehearsal=True, warm=True)
    assert benchmark.warm(parse("--warm", "--budget", "-1"), context) == 0 and ran == []
    monkeypatch.setattr(benchmark, "context_is_alive", lambda device: False)
    assert benchmark.warm(parse("--warm"), context) == benchmark.DEAD_CONTEXT and ran == ["a"]


def test_names_are_listed_and_those_of_the_headline_mean_one_row_each(capsys):
    for words, expected in ([], tuple(gpu_rows.ROWS)), (["--headline"], gpu_rows.HEADLINE):
        assert benchmark.main(["--list", *words]) == 0
        assert tuple(capsys.readouterr().out.split()) == expected
    for name in gpu_rows.HEADLINE:
        assert benchmark.plan(parse("--headline", "--only", name), ["triton"]) == [(name, "triton")]
    assert "sweep-1024" not in gpu_rows.HEADLINE and len(set(gpu_rows.HEADLINE)) == 11
    assert (parse().budget, parse("--headline").budget) == (170, 75)


def test_cuda_is_spared_what_it_has_not_or_does_slowly():
    both, headline = ["triton", "cuda"], benchmark.plan(parse("--headline"), ["triton", "cuda"])
    on_cuda = {name for name, backend in headline if backend == "cuda"}
    assert on_cuda == {"uniform", "small-64", "loss-32"}
    assert {name for name, backend in headline if backend == "triton"} == set(gpu_rows.HEADLINE)
    everything = {name for name, backend in benchmark.plan(parse(), both) if backend == "cuda"}
    assert "sweep-512" in everything and not any(name.startswith("lse") for name in everything)


# Limits and predictions.


H100 = {"tensor cores": 780e12, "memory": 3e12, "L2": 5.5e12, "gather": 2.4e12, "clock": 1.7e9}


def compute_limits(monkeypatch, work, pipes=None, **known):
    """What `Limits.times` makes of such work on a machine with given figures."""
    if pipes is not None:
        monkeypatch.setattr(gpu_limits, "sass", pipes)
    monkeypatch.setattr(gpu_limits, "multiprocessors", lambda context: 132)
    monkeypatch.setattr(gpu_limits, "l2_bytes", lambda context: 50_000_000)
    limits = gpu_limits.Limits(gpu_context.Context(CPU, [], rehearsal=True))
    limits.values = H100 | known
    limits.records = dict.fromkeys(limits.values, {})
    return limits.times(work)


def fake_sass(name, seconds):
    """Stands for bench/gpu/sass.py."""
    read = SimpleNamespace(binding=name)
    tool = SimpleNamespace(seen=[])
    tool.read_cubin = lambda cubin: tool.seen.append(cubin) or read
    tool.seconds = lambda pipes, elements, multiprocessors=132, clock_hz=1.7e9: (
        tool.seen.append((pipes, elements, multiprocessors, clock_hz)) or seconds
    )
    return tool


def test_the_largest_limit_binds(monkeypatch):
    n = 32768
    work = gpu_limits.Work(2 * n * n * 512, 2 * 2 * n * 512, 65536 * 2**18)
    found = compute_limits(monkeypatch, work)
    assert found == pytest.approx({"tensor cores": 1.4096, "memory": 0.02237, "L2": 3.1236}, rel=1e-3)
    assert gpu_limits.binding(found) == "L2"
    faster = compute_limits(monkeypatch, work, L2=55e12)
    assert gpu_limits.binding(faster) == "tensor cores"
    product = compute_limits(monkeypatch, gpu_rows.product_work(n, n, 128))  # held up by the writing of its result
    assert product == pytest.approx({"tensor cores": 0.3524, "memory": 0.7214}, rel=1e-3)
    assert gpu_limits.binding(product) == "memory"
    gathered = compute_limits(monkeypatch, gpu_limits.Work(gathered_bytes=2 * n * 256 * 128))
    assert gathered == pytest.approx({"gather": 0.8948}, rel=1e-3)
    exponentials = compute_limits(monkeypatch, gpu_limits.Work(exponentials=n * n))
    assert exponentials == pytest.approx({"special functions": 0.2991}, rel=1e-3)
    assert gpu_limits.binding({}) is None
    row = gpu_context.Row({})
    row.add_reading("time, ms", [2e-3, 4e-3, None, 6e-3], found)
    row.add_reading("time, us", [2e-3], {})
    assert row.readings[0]["binds"] == "L2" and row.readings[0]["measured"] == pytest.approx(4)
    assert row.readings[0]["time / limit"] == pytest.approx(4 / 3.1236, rel=1e-3)
    assert row.readings[1]["measured"] == pytest.approx(2000)
    assert row.readings[1]["binds"] is None and row.readings[1]["time / limit"] is None
    assert "5" not in benchmark.reading_line(row.readings[1] | {"predicted": None})


def test_what_fits_into_the_l2_is_not_held_up_by_memory(monkeypatch):
    assert compute_limits(monkeypatch, gpu_limits.Work(memory_bytes=49e6)) == {}
    assert compute_limits(monkeypatch, gpu_limits.Work(memory_bytes=60e6)) == {"memory": pytest.approx(0.02)}


def test_the_pipe_of_a_sweeps_binary_is_a_limit(monkeypatch):
    tool = fake_sass("ALU", 1.07e-3)
    found = compute_limits(monkeypatch, gpu_limits.Work(flops=7.8e11, binary=b"code", pairs=1 << 30), tool, clock=1.9e9)
    assert found == {"tensor cores": pytest.approx(1.0), "ALU pipe": pytest.approx(1.07)}
    assert gpu_limits.binding(found) == "ALU pipe"
    assert tool.seen[0] == b"code" and tool.seen[1][1:] == (1 << 30, 132, 1.9e9)
    tool.read_cubin = lambda cubin: None  # a binary that it cannot read
    assert list(compute_limits(monkeypatch, gpu_limits.Work(flops=1, binary=b"code"), tool)) == ["tensor cores"]
    del tool.read_cubin
    assert list(compute_limits(monkeypatch, gpu_limits.Work(flops=1, binary=b"code"), tool)) == ["tensor cores"]


def test_the_binary_is_that_of_the_sweep_that_a_call_launches(monkeypatch):
    pytest.importorskip("triton")
    from emc2_kernels.backends.triton import sweep

    def binary(text):
        return SimpleNamespace(asm={"cubin": text})

    kernel = SimpleNamespace(compiled={"earlier": binary(b"earlier"), "same": binary(b"first")})
    monkeypatch.setattr(sweep, "SWEEP_KERNEL", kernel)
    assert gpu_limits.sweep_binary(lambda: kernel.compiled.update(same=binary(b"mine"), count=binary(b"c"))) == b"mine"
    assert kernel.compiled.keys() == {"earlier", "same", "count"}
    assert gpu_limits.sweep_binary(lambda: None) is None and len(kernel.compiled) == 3


def test_bytes_through_the_l2_are_counted_from_the_launch():
    n = 32768
    count = gpu_limits.sweep_l2_bytes
    # 256 x 256 tiles of 128 KB of queries and 128 KB of keys: the 17.2 GB of d = 512.
    assert count(n, n, 512, 2, 128, 64, ids=False) == 65_536 * (131_072 + 131_072) == 17_179_869_184
    assert count(n, n, 512, 2, 128, 64, ids=True) == 65_536 * (131_072 + 131_072 + 1024)
    # d = 128: 512 blocks of rows keep their queries, and read all keys each.
    assert count(n, n, 128, 2, 64, 128, ids=False) == 512 * (64 * 256 + n * 256) == 4_303_355_904
    assert count(65, 129, 128, 2, 64, 128, ids=False) == 2 * (64 * 256 + 2 * 128 * 256)
    gradient = gpu_limits.gradient_l2_bytes
    # d = 128 in halves: a tile takes 16 KB of owners, 32 KB of others, and these again for the second product.
    assert gradient(n, n, 128, 2, 64, 128, 64, 128) == 512 * 256 * 1024 * (16 + 32 + 32)
    # d = 512: scores are made four times, once for each 128 columns of the result.
    assert gradient(n, n, 512, 2, 64, 128, 64, 128) == 4 * 512 * 256 * 1024 * (64 + 128 + 32)
    # Whole rows: owners once, others once for both products. Shorter rows than a block are whole, too.
    assert gradient(n, n, 128, 2, 128, 128, 128, 128) == 256 * (32 * 1024 + n * 256)
    assert gradient(n, n, 64, 2, 128, 128, 128, 128) == 256 * (16 * 1024 + n * 128)
    assert gradient(n, n, 64, 2, 128, 128, 64, 128) == 256 * (16 * 1024 + n * 128)
    # Whole rows, but half of the result at a time: for that the others' half is read once more.
    assert gradient(n, n, 128, 2, 128, 128, 128, 64) == 2 * 256 * (32 * 1024 + n * (256 + 128))
    # All of 512 at once, of 64 owners and 64 others; a last tile is filled.
    assert gradient(n, n, 512, 2, 64, 64, 512, 512) == 512 * (64 * 1024 + n * 1024)
    assert gradient(n, 65, 512, 2, 64, 64, 512, 512) == 512 * (64 * 1024 + 128 * 1024)


def test_work_is_that_of_the_shipped_settings():
    settings = pytest.importorskip("emc2_kernels.backends.triton.tuning")
    chosen, n = settings.sweep(settings.device(0)[0], True, 512, 32768), 32768
    work = gpu_rows.sweep_work("triton", n, n, 512, lambda: None)
    assert work.l2_bytes == gpu_limits.sweep_l2_bytes(n, n, 512, 2, chosen.block_m, chosen.block_d, ids=False)
    assert (work.flops, work.pairs, work.memory_bytes) == (2 * n * n * 512, n * n, 4 * n * 512)
    # The cuda backend's clusters of 256 rows read all keys, and their queries once.
    assert gpu_rows.sweep_work("cuda", n, n, 512, lambda: None).l2_bytes == n // 256 * 1024 * (n + 256)
    assert gpu_rows.lse_gradient_work(n, n, 128).flops == 2 * gpu_rows.lse_work(n, n, 128).flops == 4 * n * n * 128


def test_a_limit_is_measured_once_and_one_that_cannot_be_had_limits_nothing():
    def fails(context):
        raise RuntimeError("out of memory")

    measured = []
    limits = gpu_limits.Limits(gpu_context.Context(CPU, [], rehearsal=True))
    broken = gpu_limits.Best("byte/s", "not at all", fails)
    fine = gpu_limits.Best("byte/s", "somehow", lambda context: measured.append(1) or 5.0)
    assert [limits.best("broken", broken) for _ in range(2)] == [None, None]
    assert [limits.best("fine", fine) for _ in range(2)] == [5.0, 5.0] and len(measured) == 1
    assert limits.records["broken"]["error"] == "RuntimeError: out of memory"
    assert limits.records["fine"] == {"unit": "byte/s", "how": "somehow", "value": 5.0}


def test_what_the_machine_does_is_counted_and_divided_by_the_seconds(monkeypatch):
    monkeypatch.setattr(gpu_limits, "_seconds", lambda context, call, timer=None: call() is not None and 0.5)
    context = gpu_context.Context(CPU, [], rehearsal=True)
    assert gpu_limits.BEST["tensor cores"].find(context) == 2 * 64**3 / 0.5
    assert gpu_limits.BEST["memory"].find(context) == 2 * 2**20 / 0.5  # a megabyte read and written
    assert gpu_limits.BEST["gather"].find(context) == 2 * 400 * 256 / 0.5
    assert gpu_limits.BEST["L2"].find(context) == 4 * 65536 / 0.5


def test_limits_of_an_earlier_run_are_kept(tmp_path, monkeypatch):
    def row(context, backend):
        context.limits.best("new", gpu_limits.Best("s", "now", lambda context: 1.0))
        return gpu_context.Row({})

    monkeypatch.setattr(benchmark, "ROWS", {"row": row})
    results = {"rows": [], "limits": {"old": {"value": 2.0}}}
    benchmark.run_all(parse(), gpu_context.Context(CPU, ["a"], rehearsal=True), results, tmp_path / "out.json")
    assert {name: limit["value"] for name, limit in benchmark.read_earlier(tmp_path / "out.json")[1].items()} == {
        "old": 2.0, "new": 1.0,
    }  # fmt: skip
    assert benchmark.read_earlier(tmp_path / "none.json") == ([], {})


def test_predictions_are_for_a_backend_and_a_card():
    told = predictions.find_prediction("small-64", "replay, us", "cuda", "NVIDIA H100 80GB HBM3")
    assert told == {"low": 4, "high": 6, "for": "H100", "for_this_card": True}
    assert predictions.find_prediction("small-64", "replay, us", "triton", "NVIDIA A100")["for_this_card"] is False
    assert predictions.find_prediction("small-64", "replay, us", "triton", "NVIDIA A100")["high"] == 14
    assert predictions.find_prediction("small-64", "replay, us", "reference", "") is None
    assert predictions.find_prediction("nothing", "time, ms", "triton", "") is None
    reading = {"quantity": "replay, us", "measured": 5.0, "lower_quartile": 4.0, "upper_quartile": 6.0}
    reading |= {"limits": {"launch": 0.002, "L2": 0.001}, "binds": "launch", "time / limit": 2.5, "predicted": told}
    line = benchmark.reading_line(reading)
    assert "4 to 6 " in line and "H100" not in line and line.endswith("2.50 x launch 0.002 ms  (L2 0.001)")
    assert "4 to 6 for an H100" in benchmark.reading_line(reading | {"predicted": told | {"for_this_card": False}})


def test_the_l2_reader_reads_all_of_its_buffer(monkeypatch):
    pytest.importorskip("triton")
    from emc2_kernels.backends import gpu

    if not gpu.interpreting():
        pytest.skip("is for the interpreter")
    from bench.gpu import l2_reader

    monkeypatch.setattr(l2_reader, "BLOCK", 16)
    monkeypatch.setattr(l2_reader, "READS", 7)
    read = l2_reader.L2Read(5 * 64 / 2**20, 3, CPU)  # five blocks of 64 bytes, 12 programs
    assert read.blocks == 5 and read.bytes_read == 12 * 7 * 64
    values = read.buffer.copy_(torch.arange(80.0)).view(5, 16).sum(1)
    expected = [sum(values[(program * 7 + i) % 5] for i in range(7)) for program in range(12)]
    assert torch.equal(read(), torch.stack(expected))


def test_ids_are_those_of_a_loss():
    ids = peers.item_ids(6, 3, CPU)
    assert ids["key_ids"].unique().numel() == 3 and torch.equal(ids["query_ids"], ids["key_ids"].repeat(2))
    assert torch.equal(ids["chain_ids"], 2 * ids["query_ids"]) and torch.equal(ids["key_labels"], 2 * ids["key_ids"])
    queries = oracle.unit(3, 6, seed=1)
    walked = peers.MHStep(queries, queries, 0.01, 0, 3, "reference", ids=ids | {"query_ids": ids["key_ids"]} | {
        "chain_ids": ids["key_ids"]
    })()  # fmt: skip
    assert all(row not in walked[row] for row in range(3))  # its own item is never proposed


def test_a_gradients_step_is_both_gradients():
    queries, keys = oracle.unit(5, 6, seed=1), oracle.unit(7, 6, seed=2)
    forward = gpu_peers.LseStep(queries, keys, 0.5, "reference", backward=False)
    torch.testing.assert_close(forward(), torch.logsumexp(queries @ keys.T / 0.5, 1))
    backward = gpu_peers.LseStep(queries, keys, 0.5, "reference", backward=True)
    weights = torch.softmax(queries @ keys.T / 0.5, 1) / 0.5
    for _ in range(2):  # again and again
        d_queries, d_keys = backward()
        torch.testing.assert_close(d_queries, weights @ keys)
        torch.testing.assert_close(d_keys, weights.T @ queries)


def test_goals_are_held_to_their_bounds():
    row = gpu_context.Row({})
    row.add_goal("low", [1.0, 2.0, 3.0], "<=", 2.0)
    row.add_goal("high", [1.0, 2.0, 3.0], ">=", 2.5)
    row.add_goal("free", 7.0)
    assert [goal["met"] for goal in row.goals] == [True, False, None]
    assert [goal["goal"] for goal in row.goals] == ["<= 2", ">= 2.5", None]
    slower = [goal | {"met": False} for goal in row.goals[:2]]  # another backend's: the first one's counts
    rows = [{"name": "x", "goals": row.goals}, {"name": "x", "goals": slower}, {"name": "x", "error": "y"}]
    assert benchmark.count_goals(rows) == {"met": 1, "missed": 1, "failed_rows": 1}


def parse(*words):
    return benchmark.parse_arguments(["--rehearse", *words])


def test_a_failing_row_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(context, backend):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(
        benchmark, "ROWS", {"broken": broken, "fine": lambda context, backend: gpu_context.Row({"n": 1})}
    )
    context, results = gpu_context.Context(CPU, ["a", "b"], rehearsal=True), {"rows": []}
    assert benchmark.run_all(parse(), context, results, tmp_path / "out.json") == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["name"], row["backend"], "error" in row) for row in rows] == [
        ("broken", "a", True), ("broken", "b", True), ("fine", "a", False), ("fine", "b", False),
    ]  # fmt: skip
    assert rows[0]["error"] == "RuntimeError: CUDA error: an illegal memory access"


def test_a_lost_gpu_ends_the_run_and_the_next_resumes(tmp_path, monkeypatch):
    ran, target = [], tmp_path / "out.json"

    def row(name):
        return lambda context, backend: ran.append(name) or gpu_context.Row({})

    def died(context, backend):
        state = json.loads(target.read_text())["rows"][-1]
        assert state["error"] == benchmark.UNFINISHED  # what a process that is killed here leaves
        raise SystemExit

    monkeypatch.setattr(benchmark, "ROWS", {"first": row("first"), "killer": died, "last": row("last")})
    context, results = gpu_context.Context(CPU, ["a"], rehearsal=True), {"rows": []}
    with pytest.raises(SystemExit):
        benchmark.run_all(parse(), context, results, target)
    rows, limits = benchmark.read_earlier(target)
    results = {"rows": rows, "limits": limits}
    monkeypatch.setattr(benchmark, "context_is_alive", lambda device: False)
    assert benchmark.run_all(parse(), context, results, target) == benchmark.DEAD_CONTEXT
    assert ran == ["first", "last"]
    errors = [one.get("error") for one in json.loads(target.read_text())["rows"]]
    assert errors == [None, benchmark.UNFINISHED, None]


def test_a_row_is_not_begun_after_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ROWS", {"row": lambda context, backend: gpu_context.Row({})})
    results = {"rows": []}
    benchmark.run_all(parse("--budget", "-1"), gpu_context.Context(CPU, ["a"]), results, tmp_path / "out.json")
    assert results["rows"][0]["error"] == "not begun within -1 s" and results["goals"]["failed_rows"] == 1


def test_rows_by_name_and_by_backend():
    assert benchmark.plan(parse("--only", "sweep-1"), ["x", "y"]) == [
        ("sweep-128", "x"), ("sweep-128", "y"), ("sweep-1024", "x"), ("sweep-1024", "y"),
    ]  # fmt: skip
    assert benchmark.plan(parse("--only", "crossover"), ["x", "y"]) == [("crossover", "all")]
    assert benchmark.plan(parse(), []) == []
    with pytest.raises(SystemExit):
        parse("--only", "nothing")


def test_streaming_ntxent_is_ntxent():
    z = [oracle.unit(12, 7, seed=seed).requires_grad_() for seed in (1, 2)]
    peer, loss = gpu_peers.StreamingNTXent(0.2, block=5), NTXentLoss(temperature=0.2)
    actual, expected = peer(*z), loss(*z)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, z), torch.autograd.grad(expected, z))


def test_naive_by_blocks_draws_for_every_row():
    """Queries far apart from each other: each draws its own key."""
    queries = torch.eye(12)
    drawn = gpu_peers.BlockedNaive(queries, queries, 0.001, samples_per_row=3, block=4)()
    assert torch.equal(drawn, torch.arange(12)[:, None].expand(12, 3))
    with pytest.raises(ValueError, match="block must divide"):
        gpu_peers.BlockedNaive(queries, queries, 1.0, 3, block=5)


def test_a_device_step_walks_as_the_eager_one():
    queries, keys = oracle.unit(8, 6, seed=1), oracle.unit(20, 6, seed=2)
    eager = peers.MHStep(queries, keys, 0.5, 10, 4, "reference")
    step = gpu_peers.DeviceStep(queries, keys, carry=True, temperature=0.5, num_samples=4, backend="reference")
    for _ in range(3):
        assert torch.equal(step().samples, eager())
    assert step.step == 3


def test_index_select_and_copy_move_what_they_claim():
    keys = torch.arange(40.0).view(10, 4)
    gather = gpu_peers.IndexSelect(keys, 25)
    assert torch.equal(gather(), keys[gather.rows]) and gather.rows.max() < 10
    copy = gpu_peers.Copy(1, CPU)
    assert torch.equal(copy(), copy.source) and copy.bytes_moved == 2 << 20
