"""From images with captions and boxes to LLaVA's JSON: read, ask a teacher, filter, write.

data.json        the records that passed, for train.py --data
dropped.jsonl    the others: record or text, filter, reason
report.html      counts, examples of what each filter took, samples with their images
report.json      the counts
requests.jsonl, answers.jsonl, failures.jsonl    with a language model as the teacher, see store.py
"""

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from datagen.asking import KINDS, MOST_BOXES, Request, make_record, make_request, read_prompts, read_turns
from datagen.endpoint import BadAnswer, Endpoint, ask_all, read_completion
from datagen.filters import Context, Draft, find_fault, over_share
from datagen.items import read_items
from datagen.local import ask_local
from datagen.nouns import read_nouns
from datagen.report import write_report
from datagen.store import ANSWERS, FAILURES, Store, write_batches
from datagen.store import read_batches as read_results
from datagen.templates import ask_templates
from inputs.files import write_atomic, write_json
from inputs.records import DataError
from inputs.tokenizer import Tokenizer

CHARACTERS = 4  # of English a token has, about; --tokenizer counts exactly


@dataclass
class Result:
    """The results of a run. kept: drafts that passed; dropped: draft, filter and reason of the others."""

    requests: list[Request]
    kept: list[Draft] = field(default_factory=list)
    dropped: list[tuple[Draft, str, str]] = field(default_factory=list)
    missing: Counter = field(default_factory=Counter)  # reason -> requests without an answer
    tokens: Counter = field(default_factory=Counter)  # "input", "output": of all answers that there are
    expected: Counter = field(default_factory=Counter)  # the estimate for all requests
    money: float | None = None


def make(args: argparse.Namespace):
    """`python -m datagen make`. Raises ValueError with one line if it cannot go on; answers are kept."""
    items = read_items(args.files, args.images, args.pixels, args.skip_bad)[: args.n]
    prompts = read_prompts(args.prompts) if args.llm else None
    wanted = [(item, kind) for item in items for kind in args.kinds if item.boxes or kind != "referring"]
    options = read_options(args)
    requests = [make_request(item, kind, args.llm or "", prompts, args.no_system, options) for item, kind in wanted]
    twice = [key for key, count in Counter(request.id for request in requests).items() if count > 1]
    if twice or not requests:
        raise DataError(f"{len(twice):,} requests come twice" if twice else "no image has a box to ask about")
    if boxless := len(items) * len(args.kinds) - len(wanted):
        print(f"{boxless:,} images have no boxes: nothing is asked about places on them", file=sys.stderr)
    if prompts and (crowded := sum(len(item.boxes) > MOST_BOXES for item in items)):
        print(f"{crowded:,} images have more than {MOST_BOXES} boxes: the largest are sent", file=sys.stderr)
    result, nouns = Result(requests), read_nouns(args.nouns)
    drafts = ask_teacher(args, result) if args.llm else ask_all_templates(result, nouns)
    if drafts is None:  # batch files were written: nothing is answered yet
        return
    sift(result, drafts, args.filters, Context(nouns, prompts, args.words))
    write_result(args.out, args.images, result, args.filters, nouns)


def ask_all_templates(result: Result, nouns) -> list[Draft]:
    """The drafts of the templates; requests that leave nothing to ask are counted."""
    drafts = [Draft(request, ask_templates(request, nouns)) for request in result.requests]
    result.missing["the templates find nothing to ask"] += sum(not draft.turns for draft in drafts)
    return [draft for draft in drafts if draft.turns]


# ---------------------------------------------------------------------------------------------------------------------
# a language model


def read_options(args: argparse.Namespace) -> dict:
    """What a request asks of a teacher beside its messages; {} for templates."""
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature} | args.body if args.llm else {}
    return {name: value for name, value in options.items() if value is not None}


def ask_teacher(args: argparse.Namespace, result: Result) -> list[Draft] | None:
    """Drafts from the model's answers; those that are in the folder already are not asked for again."""
    key = os.environ.get(args.key_env, "") if args.endpoint else ""
    options = read_options(args)
    result.expected = estimate(result.requests, args)
    with Store(args.out, key) as store:
        store.keep_requests(result.requests, args.llm, options)
        if args.batch_results:
            read_batch(args.batch_results, store, {request.id for request in result.requests})
        answers = store.answers()
        todo = [request for request in result.requests if request.id not in answers]
        if others := answers.keys() - {request.id for request in result.requests}:
            print(f"{args.out}: {len(others):,} answers to other requests are kept and not used", file=sys.stderr)
        if args.batch_file and todo:
            print_cost(estimate(todo, args), len(todo), args)
            paths = write_batches(args.batch_file, todo, args.llm, options)
            names = ", ".join(map(str, paths))
            print(f"{names}: {len(todo):,} requests; nothing was called. Then: --batch-results FILE")
            return None
        if todo and not args.offline and not args.batch_results:
            ask(args, todo, store, key, options)
        return read_answers(result, store, args.price)


def ask(args: argparse.Namespace, todo: list[Request], store: Store, key: str, options: dict):
    """Ask an endpoint, after the cost is confirmed, or a local model. Raises ValueError if it ended early."""

    def keep(row: dict):
        store.append(ANSWERS, [row])

    def fail(row: dict):
        store.append(FAILURES, [row])

    if not args.endpoint:
        ask_local(Path(args.llm), todo, args.max_tokens, args.batch_size, keep, fail)
        return
    limits = {"timeout": args.timeout, "tries": args.tries, "per_minute": args.per_minute}
    endpoint = Endpoint(args.endpoint, args.llm, key, options, **limits)
    print_cost(estimate(todo, args), len(todo), args)
    confirm(args.yes)
    reason = ask_all(endpoint, todo, args.workers, keep, fail)
    if reason:
        done = len(store.answers())
        raise ValueError(
            f"{args.endpoint}: {reason}; {done:,} answers are kept in {args.out}, the same command goes on"
        )


def estimate(requests: list[Request], args: argparse.Namespace) -> Counter:
    """Tokens of all requests, and of their answers if these are as long as the longest example of their kind."""
    count = Tokenizer.load(args.tokenizer).encode if args.tokenizer else lambda text: range(-(-len(text) // CHARACTERS))
    known, total = {}, Counter()
    for request in requests:
        for message in request.messages:
            if message["content"] not in known:
                known[message["content"]] = len(count(message["content"])) + 4  # roles
            total["input"] += known[message["content"]]
        examples = [known[message["content"]] for message in request.messages if message["role"] == "assistant"]
        total["output"] += min(max(examples, default=args.max_tokens // 2), args.max_tokens)
    return total


def money_of(tokens: Counter, price: list[float] | None) -> float | None:
    return None if price is None else (tokens["input"] * price[0] + tokens["output"] * price[1]) / 1e6


def print_cost(tokens: Counter, count: int, args: argparse.Namespace):
    line = (
        f"{count:,} requests to {args.llm}: about {tokens['input']:,} tokens to read and {tokens['output']:,} to write"
    )
    options = read_options(args)
    most = count * (options.get("max_completion_tokens") or options.get("max_tokens") or args.max_tokens)
    line += f", at most {most:,}"
    money = money_of(tokens, args.price)
    most = money_of(Counter(input=tokens["input"], output=most), args.price)
    print(line + (f"; about {money:,.2f}, at most {most:,.2f}" if money is not None else "; no --price given"))


def confirm(yes: bool):
    """Ask on the terminal whether to go on. Raises ValueError if the answer is not yes, or nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("nothing was asked: no terminal to confirm the cost on; --yes confirms it")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was asked")


def read_batch(paths: list[Path], store: Store, wanted: set[str]):
    """Store the results of a batch: in any order, each id once. What cannot be used is counted on stderr."""
    known, rows, faults = set(store.answers()), [], Counter()
    for where, key, body, error in read_results(paths):
        if key is None or key not in wanted:
            faults["belongs to no request" if not error or key is not None else error] += 1
        elif key in known:
            faults["comes twice or was known"] += 1
        elif error:
            faults[error] += 1
            store.append(FAILURES, [{"custom_id": key, "reason": f"{where}: {error}"}])
        else:
            try:
                row = read_completion(key, body)
            except BadAnswer as bad:
                faults[str(bad)] += 1
                continue
            known.add(key)
            rows.append(row)
    store.append(ANSWERS, rows)
    print(f"{len(rows):,} answers from {', '.join(map(str, paths))}")
    for reason, count in faults.most_common(8):
        print(f"  {count:,} lines are not used: {reason}", file=sys.stderr)


def read_answers(result: Result, store: Store, price: list[float] | None) -> list[Draft]:
    """The drafts of all answers in the store; requests without one are counted by their last reason."""
    answers, drafts = store.answers(), []
    failures = {row["custom_id"]: str(row.get("reason")) for row in store.read(FAILURES)}
    for request in result.requests:
        row = answers.get(request.id)
        if row is None:
            result.missing[failures.get(request.id, "not asked yet")] += 1
            continue
        result.tokens.update(input=row["input_tokens"], output=row["output_tokens"])
        draft = Draft(request, cut=row["finish_reason"] == "length", text=row["text"])
        try:
            draft.turns = read_turns(request, row["text"])
        except ValueError as error:
            draft.fault = str(error)
        drafts.append(draft)
    result.money = money_of(result.tokens, price)
    return drafts


# ---------------------------------------------------------------------------------------------------------------------
# results


def sift(result: Result, drafts: list[Draft], names: list[str], context: Context):
    """Divide the drafts into kept and dropped ones, in order."""
    for draft in drafts:
        name, reason = find_fault(draft, names, context)
        if name:
            result.dropped.append((draft, name, reason))
        else:
            result.kept.append(draft)
    if "balance" in names:
        gone = over_share(result.kept)
        result.dropped += [(draft, "balance", reason) for draft, reason in gone]
        numbers = {id(draft) for draft, _ in gone}
        result.kept = [draft for draft in result.kept if id(draft) not in numbers]


def write_result(out: Path, images: Path, result: Result, names: list[str], nouns):
    """Write the files of a run. Raises DataError if no record is left; dropped.jsonl and the report then say why."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for draft, name, reason in result.dropped:
        content = (
            make_record(draft.request, draft.turns) if draft.turns else {"id": draft.request.id, "text": draft.text}
        )
        rows.append(json.dumps({"filter": name, "reason": reason} | content, ensure_ascii=False) + "\n")
    write_atomic(out / "dropped.jsonl", "".join(rows).encode(errors="backslashreplace"))
    counts = count_result(result, names)
    write_json(out / "report.json", counts)
    write_report(out / "report.html", images, result, counts, nouns)
    print_counts(counts)
    if not result.kept:
        raise DataError(f"no record passed the filters: {out}/report.html and dropped.jsonl say why")
    records = [make_record(draft.request, draft.turns) for draft in result.kept]
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    write_atomic(out / "data.json", f"[\n{lines}\n]\n".encode(errors="backslashreplace"))
    print(f"{len(records):,} records in {out}/data.json, for train.py --data {out}/data.json --images {images}")


def count_result(result: Result, names: list[str]) -> dict:
    """The numbers of report.json."""
    kept, asked = (Counter(kind) for kind in ((d.request.kind for d in result.kept), (r.kind for r in result.requests)))
    taken = defaultdict(Counter)
    for draft, name, _ in result.dropped:
        taken[name][draft.request.kind] += 1
    kinds = [kind for kind in KINDS if asked[kind]]
    counts = {"asked": dict(asked), "kept": {kind: kept[kind] for kind in kinds}}
    counts["dropped"] = {
        name: {kind: taken[name][kind] for kind in kinds} for name in (*names, *(taken.keys() - {*names}))
    }
    counts["without an answer"] = dict(result.missing.most_common())
    if result.expected:
        counts["tokens"] = {"expected": dict(result.expected), "used": dict(result.tokens)}
        counts["money"] = None if result.money is None else round(result.money, 4)
    return counts


def print_counts(counts: dict):
    """One line a kind, and one for what each filter took."""
    for kind, number in counts["asked"].items():
        print(f"{kind}: {counts['kept'][kind]:,} of {number:,} kept")
    for name, kinds in counts["dropped"].items():
        if any(kinds.values()):
            print(f"  {name}: {', '.join(f'{number:,} {kind}' for kind, number in kinds.items() if number)} dropped")
    for reason, number in counts["without an answer"].items():
        if number:
            print(f"  {number:,} without an answer: {reason}")
