"""Everything that reads what others wrote, fed with inputs that are spoilt at random: what is neither taken nor refused?

    python -m experiments.scale.fuzz [--seconds S] [--seed N] [--targets a,b]     tables and numbers in this folder

Two engines make the inputs. Hypothesis draws flaws for valid ones: bytes flipped, cut, doubled and spliced, and nodes of the
trees that they hold replaced, removed, renamed and wrapped, with checksums made to fit again. Atheris (libFuzzer) goes on
from inputs that reach code which none reached before; it needs the `experiments` extra.

An input may be accepted, or refused with a `KeditError`. A finding is any other exception, one that takes more than
5 seconds, and one that makes the process grow by more than 256 MiB. Children have a limit on their memory and are replaced
if they die. Interrupted, it writes nothing.
"""

import argparse
import base64
import dataclasses
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from experiments.machine import cores, processor

HERE = Path(__file__).parent
SLOWEST, GROWTH, ROOM = 5.0, 256 * 2**20, 2**31
"""Seconds an input may take, bytes by which it may make the process grow, and bytes that a child may take at all beside what
it has when it begins."""
ROUND = 200  # examples of Hypothesis under one seed
KEPT = 2000  # bytes of an input that led to a finding
ENGINES = ("hypothesis", "atheris")


class TooSlowError(BaseException):
    """No `Exception`, or a reader could take it for damage."""


@dataclasses.dataclass
class Tally:
    """What came of the inputs of one target; `findings` are told apart by exception and place."""

    target: str
    engine: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    cpu: float = 0.0
    findings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def found(self, what: str, said: str, data: bytes) -> None:
        """Note a finding; of each kind the first input is kept."""
        new = {"times": 0, "said": said[:300], "input": base64.b64encode(data[:KEPT]).decode()}
        self.findings.setdefault(what, new)["times"] += 1


class Watch:
    """Gives a target its inputs, one after another, and tallies what comes of them."""

    def __init__(self, target: Any, engine: str, folder: Path, store: Path) -> None:
        self.target, self.folder, self.store = target, folder, store
        self.tally, self.began, self.stored = Tally(target.name, engine), time.process_time(), 0.0
        signal.signal(signal.SIGALRM, self._ring)

    def give(self, data: bytes) -> None:
        """One input."""
        from kedit_jax.errors import KeditError

        tally, most, begin = self.tally, _most(), time.perf_counter()
        tally.inputs += 1
        signal.setitimer(signal.ITIMER_REAL, SLOWEST)
        try:
            self.target.read(data, self.folder)
            tally.accepted += 1
        except KeditError:
            tally.refused += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            tally.found(f"{type(error).__name__} in {_place(error)}", str(error), data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        tally.slowest = max(tally.slowest, time.perf_counter() - begin)
        if _most() - most > GROWTH:
            tally.found("memory", f"{(_most() - most) >> 20} MiB more", data)
        if time.perf_counter() - self.stored > 1:
            self.save()

    def save(self) -> None:
        """So that little is lost with the process."""
        self.tally.cpu, self.stored = time.process_time() - self.began, time.perf_counter()
        partial = self.store.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self.tally)), encoding="utf-8")
        partial.replace(self.store)

    @staticmethod
    def _ring(*_: object) -> None:
        raise TooSlowError(f"more than {SLOWEST:g} s")


def _most() -> int:
    """Bytes that this process has held at most; by `getrusage` alone, a child begins with what its parent had."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = [line.split()[1] for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")]
        if peak:
            return int(peak[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(error: BaseException) -> str:
    """The last line of this package that the exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "kedit_jax" in frame.filename and "site-packages" not in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].name}"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- children ---------------------------------------------------------------------------------------------------------


def drawn(names: list[str], seconds: float, seed: int, home: Path) -> None:
    """Some targets under Hypothesis."""
    from experiments.scale.hostile import make_targets, make_world

    targets = make_targets(make_world(Path(tempfile.mkdtemp(dir=home))))
    for name in names:
        target = targets[name]
        watch = Watch(target, "hypothesis", Path(tempfile.mkdtemp(dir=home)), home / f"hypothesis-{name}.json")
        for data in target.seeds:
            watch.give(data)
        if not watch.tally.accepted:
            raise RuntimeError(f"{name}: no valid input is accepted")
        if name == names[0]:
            _limit_memory()
        explore(watch, seconds, seed)
        watch.save()


def explore(watch: Watch, seconds: float, seed: int) -> None:
    """Rounds of Hypothesis, each under a seed of its own, until the time is up."""
    from hypothesis import HealthCheck, Phase, given, settings, strategies
    from hypothesis import seed as seeded

    from experiments.scale.hostile import spoilt

    seeds, end = watch.target.seeds, time.perf_counter() + seconds
    rounds = settings(
        max_examples=ROUND // 10 if watch.target.slow else ROUND,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @rounds
    @given(strategies.sampled_from(seeds), strategies.randoms(use_true_random=False))
    def one(data: bytes, rng: random.Random) -> None:
        watch.give(spoilt(watch.target, data, rng))

    for number in itertools.count(seed, 1000):
        if time.perf_counter() > end:
            break
        seeded(number)(one)()


def guided(name: str, seconds: float, seed: int, home: Path) -> None:
    """One target under Atheris, which never returns."""
    import atheris

    with atheris.instrument_imports(include=["kedit_jax"], enable_loader_override=False):
        from experiments.scale.hostile import make_targets, make_world, spoilt

    target = make_targets(make_world(Path(tempfile.mkdtemp(dir=home))))[name]
    corpus = Path(tempfile.mkdtemp(dir=home))
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)
    watch = Watch(target, "atheris", Path(tempfile.mkdtemp(dir=home)), home / f"atheris-{name}.json")
    end = time.perf_counter() + seconds

    def one(data: bytes) -> None:
        if time.perf_counter() > end:
            watch.save()
            os._exit(0)
        watch.give(data)

    def mutated(data: bytes, size: int, number: int) -> bytes:
        """Half of them are libFuzzer's own, the others have flaws in the trees that they hold."""
        rng = random.Random(number)
        return atheris.Mutate(data, size) if rng.random() < 0.5 else spoilt(target, bytes(data), rng)[:size]

    options = [f"-seed={seed + 1}", "-max_len=200000", "-handle_alrm=0", "-rss_limit_mb=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutated)
    _limit_memory()
    atheris.Fuzz()


# --- the experiment ---------------------------------------------------------------------------------------------------


def run(engine: str, names: list[str], seconds: float, seed: int, home: Path) -> list[Tally]:
    """What came of these targets under one engine; a child that dies is a finding of the target that it was at."""
    tallies: list[Tally] = []
    left = list(names)
    while left:
        command = [sys.executable, "-m", "experiments.scale.fuzz", "--child", engine, "--targets", ",".join(left)]
        command += ["--seconds", str(seconds), "--seed", str(seed), "--home", str(home)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        limit = len(left) * (2 * seconds + 30) + 120
        with (home / "said").open("wb") as said:
            try:
                status = subprocess.run(
                    command, stdout=said, stderr=said, env=environment, timeout=limit, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = -signal.SIGKILL
        ended = [name for name in left if (home / f"{engine}-{name}.json").exists()]
        for name in ended:
            tallies.append(Tally(**json.loads((home / f"{engine}-{name}.json").read_text(encoding="utf-8"))))
        if status:
            end = (home / "said").read_bytes()[-2000:].decode(errors="replace")
            if not ended:
                raise RuntimeError(f"{engine} of {left} ended with {status} before the first input:\n{end}")
            tallies[-1].found(f"the process ended with {status}", end, b"")
        left = left[len(ended) :]
    return tallies


def table(tallies: list[Tally], reads: dict[str, str]) -> str:
    """Markdown, a row a target."""
    lines = [
        "| target | reads | Hypothesis | Atheris | accepted | refused | findings | slowest, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(tally.target for tally in tallies):
        own = [tally for tally in tallies if tally.target == name]
        counts = {engine: sum(tally.inputs for tally in own if tally.engine == engine) for engine in ENGINES}
        shown = [f"{counts[engine]:,}" if counts[engine] else "–" for engine in ENGINES]
        lines.append(
            f"| {name} | {reads[name]} | {' | '.join(shown)} | {sum(t.accepted for t in own):,} | "
            f"{sum(t.refused for t in own):,} | {sum(len(t.findings) for t in own)} | {max(t.slowest for t in own):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each target under each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", help="some of them, by name; writes no results")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        names = options.targets.split(",")
        if options.child == "hypothesis":
            drawn(names, options.seconds, options.seed, options.home)
        else:
            guided(names[0], options.seconds, options.seed, options.home)
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        from experiments.scale.hostile import make_targets, make_world

        targets = make_targets(make_world(home))
        names = options.targets.split(",") if options.targets else list(targets)
        unknown = sorted(set(names) - set(targets))
        if unknown:
            sys.exit(f"no targets {', '.join(unknown)}; there are {', '.join(targets)}")
        fast = [name for name in names if not targets[name].slow]
        work = [("hypothesis", names), *(("atheris", [name]) for name in fast)]
        tallies: list[Tally] = []
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("targets x engines", total=len(names) + len(fast))
            for engine, some in work:
                progress.update(task, description=f"{engine}: {some[0] if len(some) == 1 else 'all'}")
                tallies += run(engine, some, options.seconds, options.seed, home)
                progress.advance(task, len(some))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in usage)
    made = table(tallies, {name: targets[name].reads for name in names})
    total, found = sum(tally.inputs for tally in tallies), sum(len(tally.findings) for tally in tallies)
    print(made)
    for tally in tallies:
        for what, one in tally.findings.items():
            print(f"{tally.target}, {tally.engine}: {what}, {one['times']} times: {one['said']!r}", file=sys.stderr)
    if not options.targets:
        content = {
            "seconds": options.seconds, "seed": options.seed, "inputs": total, "cpu_seconds": round(cpu, 1),
            "processor": processor(), "cores": cores(), "targets": [dataclasses.asdict(tally) for tally in tallies],
            "versions": {name: metadata.version(name) for name in ENGINES},
        }  # fmt: skip
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "fuzz.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        told = {"table": made, "inputs": f"{total:,}", "findings": found, "cpu": f"{cpu:.0f}", "seconds": options.seconds}
        (HERE / "FUZZ.md").write_text(REPORT.format(**told), encoding="utf-8")
    if found:
        sys.exit(f"{found} findings")


REPORT = """# Fuzzing

Written by `python -m experiments.scale.fuzz --seconds {seconds:g}` (numbers in `results/fuzz.json`): {inputs} inputs,
{findings} findings, {cpu} CPU-seconds. `experiments/scale/hostile.py` says what each target does with an input, and how
inputs are spoilt.

{table}
Atheris (in a process of its own for each target) is not run on what takes tens of milliseconds an input. Seconds include
what other processes on the machine took. Tests have a quick form of it: `tests/test_fuzzed.py`.

## What was found and mended

By these targets, before the mends; each has a test in `tests/test_untrusted.py`:

- header, index, config: JSON nested deeply ended in a RecursionError, a number of thousands of digits in a ValueError, and
  a shard's name of thousands of characters in an OSError.
- config: layers beyond any (a billion) made lists for as long as memory lasted, sizes of 400 digits ended in a TypeError of
  NumPy's, and a share of rotated components of 1e308 would have in an OverflowError. Sizes now have bounds.
- tokenizer: `tokenizers` raises Exception itself, transformers a RecursionError or an AttributeError, and a panic of the
  Rust code is no Exception at all (this one by the first full run of this program).
- requests, records: halves of characters (lone surrogates) were accepted in requests and ids, and could then not be
  stored. A field that one schema ignores (`weight` beside EasyEdit's fields) was read once a record was written in another.
- tasks: a KeyError where a sentence was missing.
- settings, options: `!!timestamp x` and its like ended in PyYAML's own AttributeError, brackets in a RecursionError, sizes
  of hundreds of digits in an OverflowError.
- manifest, session: 30 places where a field that was missing or of another type ended in a KeyError, TypeError,
  AttributeError, ValueError or RecursionError, of all formats. All problems of a manifest are now listed at once.
- moments, delta, export: KeyErrors, TypeErrors and RecursionErrors of what a file says of itself, signed anew.

By reading the code, which no input of these targets would have shown:

- A session's `.lock` that is a symbolic or hard link had the file that it leads to emptied by the next writer; links,
  pipes and devices in a session were read for their checksums; `.writing-*` could be a link to another folder.
- 100 KB of a session could hold gigabytes of zeros, a small gzip file gigabytes of records or of blanks; lists of problems
  grew with them. Nine lines of YAML aliases could stand for a billion values.
- A `config.json` without an end (a device) was read whole; a document of a corpus may no longer be of any length.
- A manifest's fingerprint of moments was part of a path; a checkpoint's `merges.txt` that is a link to a private file was
  copied into exports.
- A stored prior with the right checksum was taken whatever its shape and numbers.
- Texts of a session could style the terminal (`[bold]`), end a command (`[/]`), or send it escape sequences.
"""

if __name__ == "__main__":
    main()
