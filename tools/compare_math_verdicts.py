"""Verdicts on the public table of answers in mathematics: `math_answer` beside other checkers that are installed.

    python -m tools.compare_math_verdicts [--cases] [--table tests/unit/rewards/math_cases.txt]

Prints a table in Markdown: right, false positives, false negatives, unknown, raised, and the median of CPU time per
case; with --cases also each case that some checker gets wrong. Others are math-verify (`pip install math-verify`),
called as its README does, and verl's two scorers for mathematics (`pip install --no-deps verl`), whose files are loaded
without the rest of verl. All get the answer in a box; what raises is counted as such and is neither right nor wrong.
"""

import argparse
import importlib.util
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from megatron_rl.rewards.mathematics.comparison import compare
from megatron_rl.rewards.mathematics.verdict import Verdict

TABLE = Path(__file__).parents[1] / "tests" / "unit" / "rewards" / "math_cases.txt"

Case = tuple[str, bool, str]
Checker = Callable[[str, str], bool | None]
"""(reference, answer) -> whether they are the same; None: unknown."""


def cases_of(file: Path) -> list[Case]:
    """(reference, whether they are the same, answer)."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    matches = [re.fullmatch(r"(.*?) (==|!=) (.*)", line) for line in lines]
    return [(match[1], match[2] == "==", match[3]) for match in matches if match]


def ours(reference: str, answer: str) -> bool | None:
    """`math_answer`'s verdict, with its defaults."""
    verdict = compare(reference, answer)
    return None if verdict is Verdict.unknown else verdict is Verdict.same


def others() -> Iterator[tuple[str, Checker]]:
    """Checkers that are installed."""
    if importlib.util.find_spec("math_verify"):
        from importlib.metadata import version

        from math_verify import parse, verify

        def math_verify(reference: str, answer: str) -> bool:
            return bool(verify(parse(f"\\boxed{{{reference}}}"), parse(f"\\boxed{{{answer}}}")))

        yield f"math-verify {version('math-verify')}", math_verify
    for name in ("math_dapo", "math_reward"):
        module = _verl_scorer(name)
        if module is None:
            continue
        if name == "math_dapo":

            def scorer(reference: str, answer: str, module: ModuleType = module) -> bool:
                return bool(module.compute_score(f"\\boxed{{{answer}}}", reference, strict_box_verify=True)["acc"])
        else:

            def scorer(reference: str, answer: str, module: ModuleType = module) -> bool:
                return bool(module.compute_score(f"\\boxed{{{answer}}}", reference))

        yield f"verl's {name}", scorer


def _verl_scorer(name: str) -> ModuleType | None:
    found = importlib.util.find_spec("verl")
    if found is None or found.submodule_search_locations is None:
        return None
    file = Path(found.submodule_search_locations[0]) / "utils" / "reward_score" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge(checker: Checker, cases: list[Case]) -> tuple[list[str], float]:
    """(Outcome of each case, median of CPU seconds)."""
    outcomes, seconds = [], []
    for reference, same, answer in cases:
        start = time.process_time()
        try:
            verdict = checker(reference, answer)
        except Exception:  # noqa: BLE001 - whatever a checker raises
            outcomes.append("raised")
            continue
        finally:
            seconds.append(time.process_time() - start)
        if verdict is None:
            outcomes.append("unknown")
        else:
            outcomes.append("right" if verdict == same else "false positive" if verdict else "false negative")
    return outcomes, statistics.median(seconds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="lines 'reference == answer' and 'reference != answer'"
    )
    parser.add_argument("--cases", action="store_true", help="print each case that some checker gets wrong")
    arguments = parser.parse_args()
    cases = cases_of(arguments.table)
    judged = {name: judge(checker, cases) for name, checker in [("math_answer", ours), *others()]}
    columns = ("right", "false positive", "false negative", "unknown", "raised")
    print(f"| {len(cases)} cases | {' | '.join(columns)} | median ms |")
    print("|" + "---|" * (len(columns) + 2))
    for name, (outcomes, median) in judged.items():
        counts = Counter(outcomes)
        print(f"| {name} | {' | '.join(str(counts[column]) for column in columns)} | {1000 * median:.2f} |")
    if arguments.cases:
        print(f"\n| reference | truth | answer | {' | '.join(judged)} |")
        print("|" + "---|" * (len(judged) + 3))
        for place, (reference, same, answer) in enumerate(cases):
            row = [outcomes[place] for outcomes, _ in judged.values()]
            if set(row) != {"right"}:
                shown = (f"`{text}`".replace("|", "\\|") for text in (reference, answer))
                print(f"| {next(shown)} | {'=' if same else '≠'} | {next(shown)} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
