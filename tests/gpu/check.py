"""Every op with a CUDA implementation, on a GPU: is it right, and how near does it come to the memory's bandwidth?

    check.py [--device cuda] [--budget 360] [--output build/gpu-check]     what `make gpu-check` runs
    check.py --sanitizer                                                   the first checks under compute-sanitizer's tools
    check.py --device cpu                                                  the checks themselves, small, on any machine
    check.py --write docs/gpu.md [--output build/gpu-check]                fill the ledger from the results of a run

Each result is one line of results.jsonl in the output folder, written when it is known, those that matter most first.
The exit status is 1 where a result is wrong. An op that fails a check gets no speed.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FAMILIES = ("blockdct", "blockdct_rgb", "coordconv", "maskmm", "cca", "networks")  # each has a file cases_<family>.py
OPTIONAL = {"triton": "dct_normalize, coordconv, most of maskmm, cca and torch.compile run in it"}


def ops_of(row):
    return row["op"].split(", ")


class Run:
    """The results so far: printed, kept, and appended to a file."""

    def __init__(self, output, budget):
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / "results.jsonl"
        self.path.write_text("")
        self.rows = []
        self.end = time.monotonic() + budget

    def add(self, kind, op, name, status, **more):
        row = {"kind": kind, "op": op, "name": name, "status": status, **more}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        details = " ".join(f"{key}={value}" for key, value in more.items())
        print(f"{status:<8}{kind:<8}{op}: {name}  {details}", flush=True)

    def late(self):
        return time.monotonic() > self.end

    def failed(self, op):
        return any(
            row["kind"] == "correct" and row["status"] == "wrong" and set(ops_of(row)) & set(op.split(", "))
            for row in self.rows
        )


def facts(device):
    import fourfold as ff
    import torch

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": ff.build_info(),
    }
    found["triton"] = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["L2"] = properties.L2_cache_size
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    else:
        found["device"] = platform.processor() or platform.machine()
    return found


def parts(result):
    return result if isinstance(result, tuple) else (result,)


def told(error):
    return f"{type(error).__name__}: {error}"[:2000]


def check(run, case, device):
    import torch
    from gpu.harness import Unavailable

    start = time.monotonic()
    try:
        case.run(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Unavailable as reason:
        return run.add("correct", case.op, case.name, "skipped", reason=str(reason))
    except Exception as error:  # the remaining cases still tell something; this row makes the run fail
        return run.add("correct", case.op, case.name, "wrong", error=told(error))
    return run.add("correct", case.op, case.name, "ok", seconds=round(time.monotonic() - start, 2))


def launches(contest):
    """What a call costs where inputs are so small that launching is all of it, for ours and each rival."""
    from gpu.harness import seconds_per_call

    calls = {"ours": contest.ours, **contest.rivals}
    spans = {name: seconds_per_call(call, contest.inputs * 20, graph=False) for name, call in calls.items()}
    return {f"launch us {name}": round(span * 1e6, 1) for name, span in spans.items()}


def measure(run, case, device, small, bandwidth):
    import torch
    from gpu.harness import Unavailable, peak_megabytes, seconds_per_call

    name = case.name + (" cut down" if small else "")
    if run.failed(case.op):
        return run.add("speed", case.op, name, "skipped", reason="a check of this op failed")
    torch._dynamo.reset()  # what is compiled here is compiled for these sizes
    found, problems = {}, []
    try:
        contest = case.make(device, small)
        expected = [part.double() for part in parts(contest.ours(contest.inputs[0]))]
        ours = seconds_per_call(contest.ours, contest.inputs, graph=contest.graph)
        found["us"] = round(ours * 1e6, 1)
        if contest.items:
            found["per second"] = round(contest.items / ours, 1)
        crossing = None if small else contest.moved  # small: it is all in a cache
        found["share"] = crossing and round(crossing / ours / bandwidth, 3)
        for floor, call in contest.floor.items():
            found[f"of {floor}"] = round(seconds_per_call(call, contest.inputs, graph=contest.graph) / ours, 3)
        for rival, call in contest.rivals.items():
            pairs = zip(parts(call(contest.inputs[0])), expected, strict=True)
            error = max((part.double() - right).abs().max().item() for part, right in pairs)
            if error <= contest.tolerance:
                found[f"times {rival}"] = round(seconds_per_call(call, contest.inputs, graph=contest.graph) / ours, 2)
            else:
                problems.append(f"{rival} differs by {error:.3g}")
        if case.hot and contest.graph and device.type == "cuda":
            found |= launches(case.make(device, True))
        if contest.memory and device.type == "cuda":
            for who, call in {"ours": contest.ours, **contest.rivals}.items():
                found[f"MB {who}"] = round(peak_megabytes(call, contest.inputs[0]), 1)
    except Unavailable as reason:
        return run.add("speed", case.op, name, "skipped", reason=str(reason))
    except Exception as error:  # as in check: told, and the run fails
        problems.append(told(error))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if problems:
        return run.add("speed", case.op, name, "wrong", error="; ".join(problems), **found)
    return run.add("speed", case.op, name, "ok", **found)


def everything(device, budget, output, first_checks=False):
    """All cases, or the checks alone that matter most."""
    import torch
    from gpu import harness

    families = [importlib.import_module(f"gpu.cases_{name}") for name in FAMILIES]
    small = device.type != "cuda"
    if not small and not torch.cuda.is_available():
        sys.exit("gpu-check needs a GPU that torch can use; run it with --device cpu to try the checks themselves")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # rivals compute what we compute
    run = Run(output, budget)
    today = datetime.date.today().isoformat()
    run.add("facts", "", "machine", "ok", date=today, kind_of_device=device.type, **facts(device))
    for package, use in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            run.add("package", "", package, "skipped", reason=f"not installed; {use}")
    if first_checks:
        for case in (case for family in families for case in family.CHECKS if case.hot):
            check(run, case, device)
        return run.rows
    bandwidth = harness.copy_bandwidth(device, small)
    run.add("facts", "", "copy", "ok", GB_per_s=round(bandwidth / 1e9, 1))

    for hot in (True, False):
        for family in families:
            for case in family.CHECKS:
                if case.hot == hot and run.late():
                    run.add("correct", case.op, case.name, "skipped", reason="out of time")
                elif case.hot == hot:
                    check(run, case, device)
            for case in family.SPEEDS[: 2 if small else None]:
                if case.hot == hot and run.late():
                    run.add("speed", case.op, case.name, "skipped", reason="out of time")
                elif case.hot == hot:
                    measure(run, case, device, small, bandwidth)
    return run.rows


SANITIZERS = ("memcheck", "racecheck")
FOUND_SOMETHING = 86  # an exit status of nothing else


def sanitize(device, output):
    """The first checks under each tool: {tool: what came of it}, in words. Slow: a tool takes minutes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        sys.exit("--sanitizer needs compute-sanitizer, which comes with the CUDA toolkit, on the PATH")
    verdicts = {}
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND_SOMETHING), sys.executable, __file__, "--first-checks"]
        command += ["--device", device.type, "--output", output / name]
        # Memory that torch keeps for later use would hide what is read beyond a tensor's end.
        done = subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False)
        words = {0: "clean", FOUND_SOMETHING: "errors, printed above"}
        verdicts[name] = words.get(done.returncode, f"ended with status {done.returncode}")
        print(f"{name}: {verdicts[name]}", flush=True)
    (output / "sanitizer.json").write_text(json.dumps(verdicts))
    return verdicts


def share_of(row):
    """What a row of speed tells, in words: a share of a copy's bandwidth, or of the speed of a floor; or nothing."""
    if row["kind"] != "speed" or row["status"] != "ok" or row["name"].endswith("cut down"):
        return []
    shares = {"copy": row["share"]} | {key.removeprefix("of "): value for key, value in row.items() if key.startswith("of ")}
    return [f"{share:.2f} of {what} ({row['name']})" for what, share in shares.items() if share][:1]


def summary(rows):
    """{op: (verdict, share)} in words."""
    ops = sorted({op for row in rows if row["kind"] == "correct" for op in ops_of(row)})
    words = {}
    for op in ops:
        checks = [row for row in rows if row["kind"] == "correct" and op in ops_of(row)]
        wrong = [row["name"] for row in checks if row["status"] == "wrong"]
        done = sum(row["status"] == "ok" for row in checks)
        skipped = len(checks) - done - len(wrong)
        verdict = f"no: {wrong[0]}" if wrong else f"yes, {done} checks" + (f", {skipped} skipped" if skipped else "")
        shares = [share for row in rows if row["op"] == op for share in share_of(row)]
        words[op] = verdict, shares[0] if shares else "not measured"
    return words


def write_ledger(rows, ledger):
    """Replaces the rows of the ops that were checked."""
    machine = next(row for row in rows if row["name"] == "machine")
    if machine["kind_of_device"] != "cuda":
        sys.exit("these results are not of a GPU; the ledger stays as it is")
    text = ledger.read_text()
    for op, (verdict, share) in summary(rows).items():
        row = f"| `{op}` | {verdict} | {share} | {machine['device']} | {machine['date']} |"
        text, count = re.subn(rf"^\| `{op}` \|.*$", row.replace("\\", r"\\"), text, flags=re.MULTILINE)
        if count != 1:
            sys.exit(f"{ledger} has {count} rows for {op}; it must have one")
    ledger.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--budget",
        type=float,
        default=360,
        help="seconds after which no further case starts",
    )
    parser.add_argument("--output", type=Path, default=Path("build/gpu-check"))
    parser.add_argument(
        "--write",
        type=Path,
        help="run nothing: fill this ledger from the results in --output",
    )
    parser.add_argument("--sanitizer", action="store_true", help="run the first checks under compute-sanitizer")
    parser.add_argument("--first-checks", action="store_true", help="no speeds, and only the checks that matter most")
    given = parser.parse_args()
    if given.write:
        write_ledger(
            [json.loads(line) for line in (given.output / "results.jsonl").read_text().splitlines()],
            given.write,
        )
        return 0

    import torch

    warnings.simplefilter("ignore", UserWarning)
    device = torch.device(given.device)
    if given.sanitizer:
        given.output.mkdir(parents=True, exist_ok=True)
        return 0 if set(sanitize(device, given.output).values()) == {"clean"} else 1
    rows = everything(device, given.budget, given.output, given.first_checks)
    print(f"\n{'op':<16}{'correct?':<44}share of bandwidth")
    for op, (verdict, share) in summary(rows).items():
        print(f"{op:<16}{verdict:<44}{share}")
    wrong = [row for row in rows if row["status"] == "wrong"]
    skipped = sum(row["status"] == "skipped" for row in rows)
    print(f"{len(rows)} rows, {len(wrong)} wrong, {skipped} skipped: {given.output / 'results.jsonl'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
