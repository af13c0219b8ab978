"""Chat with a model in the browser, and serve it to programs that speak OpenAI's interface.

    python -m serve --model DIR                     http://127.0.0.1:8000: the page; .../v1: the interface
    python -m serve --model DIR --adapter DIR --bits 4
    python -m serve --model DIR --host 0.0.0.0      for other machines: there are no passwords and no encryption

Without --model it takes the newest finished run below out/. docs/serve.md has the interface and its limits.
"""

import argparse
import errno
import importlib.util
import socket
import sys
from pathlib import Path

from data import render_dialogue
from fast.accelerate import accelerate
from formats.adapters import load_with_adapter
from formats.weights import DTYPES, choose_dtype, choose_template
from inputs import cli
from inputs.records import Turn
from inputs.templates import TEMPLATES
from serve.engine import Engine
from training import runs
from training.ranks import choose_device


def read_flags() -> argparse.Namespace:
    """The command line; an unknown flag or value ends the program with status 2."""
    parser = cli.make_parser(__doc__, "python -m serve")
    add = parser.add_argument
    add("--model", type=Path, help="folder of a model; default: the newest finished run below out/")
    add("--adapter", type=Path, help="folder of an adapter (LoRA or --tune) for --model")
    add("--bits", type=int, choices=(4, 16), default=16, help="4: the decoder's layers in NF4, a quarter of the memory")
    add("--template", choices=TEMPLATES, help="conversation template; default: the model's")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    add("--port", type=int, default=8000, help="0: any free port")
    add("--allow-host", action="append", default=[], help="a further name of this server, beside its numbers")
    add("--rows", type=int, default=8, help="requests answered at the same time")
    add("--queue", type=int, default=32, help="requests that may wait; the next one is refused with status 429")
    add("--per-client", type=int, default=32, help="open requests of one address; the next one gets status 429")
    args = parser.parse_args()
    if args.rows < 1 or args.queue < 0 or args.per_client < 1 or not 0 <= args.port < 65536:
        parser.error("--rows and --per-client must be at least 1, --queue at least 0, --port in [0, 65535]")
    return args


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises ValueError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        remedy = ": choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}{remedy}") from None


def serve(args: argparse.Namespace):
    """Load a model and serve it until Ctrl-C or SIGTERM. Raises ValueError before that if it cannot."""
    if not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))):
        raise ValueError('fastapi and uvicorn are not installed: pip install -e ".[serve]"')
    import uvicorn

    from serve.app import Service, make_app

    folder = runs.choose_base(args.model, args.adapter, "serve")
    listener = listen(args.host, args.port)  # before the model is loaded, which may take minutes
    device = choose_device(args.device)
    model, tokenizer = load_with_adapter(folder, args.adapter, device, choose_dtype(args.dtype, device), args.bits)
    if model.config.relevance_bounds:
        raise ValueError(f"{folder}: its question chooses patches, which only sample.py and eval.py can do so far")
    choose_template(model.config, tokenizer, args.template)
    render_dialogue([Turn("a", "b"), Turn("a", None)], tokenizer, model.config.template, 0)  # it may lack its tokens
    accelerate(model)
    for part, name in ((tokenizer, "encode"), (tokenizer.codec, "encode_word")):
        if hasattr(part, name):  # without their caches, which would keep the texts of all users
            setattr(part, name, part.encode_uncached)
    engine = Engine(model, tokenizer, args.rows)
    hosts = {"localhost", args.host.lower(), *map(str.lower, args.allow_host)}
    service = Service(engine, (args.adapter or folder).resolve().name, args.queue, args.per_client, hosts)
    host, port = listener.getsockname()[:2]
    print(f"serve: http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
    limits = {"timeout_graceful_shutdown": 2, "limit_concurrency": 512}  # seconds; connections, idle ones too
    config = uvicorn.Config(make_app(service), log_level="warning", **limits)
    uvicorn.Server(config).run([listener])
    engine.close()


def main():
    """Serve, or say in one line why not and exit with status 2."""
    args = read_flags()
    try:
        serve(args)
    except (ValueError, OSError) as error:
        print(f"serve: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # uvicorn raises it again after it has shut down
        pass


if __name__ == "__main__":
    main()
