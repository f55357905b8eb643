"""`python -m rheoserve_sgl doctor` and `plan`: is this machine fit to serve, and what does a load need?

Both end with 1 if the answer is no, and with 2 for an argument, or a model, that cannot be.
"""

import argparse
import json
import math
import sys
from pathlib import Path


def doctor(args) -> int:
    from rheoserve_sgl.doctor.finding import as_table
    from rheoserve_sgl.doctor.machine import look_at_machine
    from rheoserve_sgl.doctor.operators import look_at_operators
    from rheoserve_sgl.doctor.software import look_at_software

    findings = [*look_at_software(), *look_at_machine(), *look_at_operators()]
    bad = [finding for finding in findings if finding.state == "bad"]
    if args.json:
        print(json.dumps({"fit": not bad, "findings": [finding.as_dict() for finding in findings]}))
    else:
        print(as_table(findings))
        print(f"\n{'fit to serve' if not bad else 'not fit to serve: ' + ', '.join(f.name for f in bad)}")
    return 1 if bad else 0


def plan(args) -> int:
    from rheoserve_sgl.doctor.needs import GB, Load, advise, free_bytes, free_device_bytes, needs_of
    from rheoserve_sgl.doctor.step import predict_step, rates_here

    for name in ("context", "concurrency", "tp_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; legal: at least 1")
    for name in ("host_gb", "device_gb"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; legal: a finite number of GB, at least 0")
    host = free_bytes(args.tp_size) if args.host_gb is None else int(args.host_gb * GB / args.tp_size)
    device = free_device_bytes() if args.device_gb is None else int(args.device_gb * GB) or None
    command = ["--model-path", str(args.model)] + (["--tp-size", str(args.tp_size)] if args.tp_size > 1 else [])
    load = Load(args.context, args.concurrency)
    needs = needs_of(args.model, args.tp_size, on_gpu=device is not None)
    if load.context > needs.longest:
        raise ValueError(f"--context is {load.context}; legal: 1 to {needs.longest}, which the model was made for")
    lines, fits = advise(load, needs, host, device, command)
    if fits and (device is None) == (free_device_bytes() is None):  # rates of another machine are not known here
        lines.insert(-1, predict_step(load, needs, rates_here(*needs.heads), device))
    print("\n".join(lines))
    return 0 if fits else 1


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rheoserve_sgl", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    looks = commands.add_parser("doctor", help="look at the machine, the versions, the hooks and the operators")
    looks.add_argument("--json", action="store_true", help="one line for programs instead of a table")
    looks.set_defaults(run=doctor)
    sizes = commands.add_parser("plan", help="memory that a load needs in both tiers, and the flags for it")
    sizes.add_argument("--model", type=Path, required=True, help="local Hugging Face checkpoint")
    sizes.add_argument("--context", type=int, required=True, help="tokens of a request, prompt and answer")
    sizes.add_argument("--concurrency", type=int, required=True, help="requests at once")
    sizes.add_argument("--tp-size", type=int, default=1, help="tensor-parallel ranks; figures are of each")
    sizes.add_argument("--host-gb", type=float, help="host memory, of another machine; default: what is free here")
    sizes.add_argument("--device-gb", type=float, help="memory of each GPU, of another machine; 0: none")
    sizes.set_defaults(run=plan)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
