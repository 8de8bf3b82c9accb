"""`dynllava serve CHECKPOINT`: arguments, the port, the checkpoint, and the server until Ctrl-C."""

from __future__ import annotations

import argparse
import socket

from dynllava_plugin.errors import UserError, check_installed

NEEDED = ("fastapi", "uvicorn", "openai")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, hub id, or tiny; requests call it so")
    add(
        "--policy",
        help='of requests that name none, e.g. image_text or "fastv,k=3" (default: the checkpoint\'s)',
    )
    add(
        "--batch_size",
        "--batch-size",
        type=int,
        default=8,
        help="requests that wait are answered together, so many at most (default: %(default)s)",
    )
    add(
        "--image_urls",
        "--image-urls",
        choices=("public", "any", "none"),
        default="public",
        help="where images may be fetched from: not from this machine or its network, anywhere, or nowhere "
        "(default: %(default)s)",
    )
    add(
        "--max_request_mib",
        "--max-request-mib",
        type=int,
        default=96,
        help="a larger request is refused; an image of 64 MiB as a data: URL fits (default: %(default)s)",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--dtype", help="float32, bfloat16, float16 (default: the checkpoint's)")
    add("--device", help="cpu, cuda, cuda:0, ...")
    add("--attn_implementation", "--attn-implementation", help="eager, sdpa or flash_attention_2")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C; the port and the packages are looked at before the checkpoint costs time."""
    check_installed("serve", "serve", *NEEDED)
    for flag in ("batch_size", "max_request_mib"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag}: {getattr(args, flag)} is not a positive whole number")
    with bound(args.host, args.port) as listener:
        from dynllava_plugin import load_model
        from dynllava_plugin.serve.app import serve
        from dynllava_plugin.serve.chat import ChatHandler

        asked = {} if args.policy is None else {"policy": args.policy}
        model, processor = load_model(
            args.checkpoint, device=args.device, dtype=args.dtype, attn_implementation=args.attn_implementation,
            **asked,
        )  # fmt: skip
        try:
            handler = ChatHandler(args.checkpoint, model, processor, args.batch_size, args.image_urls)
            serve(handler, listener, args.max_request_mib)
        except KeyboardInterrupt:
            pass
        except OSError as error:  # another server took the port while the checkpoint was loading
            raise _unusable(args.host, args.port, error) from None
    return 0


def bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, not listening yet.

    Raises
    ------
    UserError
        A port in use or out of range, an address that isn't this machine's.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port: {port} is not between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host: {host} is no address of this machine ({error.strerror})") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _unusable(host, port, error) from None
    return listener


def _unusable(host: str, port: int, error: OSError) -> UserError:
    reason = (error.strerror or str(error)).lower()
    return UserError(f"--port: {port} on {host} can't be had ({reason}); choose another one, or 0")
