"""Print the JSON schema of a file format, for editors and other programs; without a name, the formats there are.

A schema tells fields and types. What else must hold (sums of layers, ranks that exist) the commands check that read the file.
"""

from __future__ import annotations

import argparse

SUMMARY = "print the JSON schema of a file format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="FORMAT", nargs="?", help="workload, profile, partition, plan, timeline, example, device, measured-steps or tuned")


def run(args: argparse.Namespace) -> int:
    import msgspec

    from megatron_dip.cost.device import DEVICE_FORMAT, DeviceDescription
    from megatron_dip.simulator.measured_steps import MEASURED_STEPS_FORMAT, MeasuredSteps
    from megatron_dip.spec.codec import FORMATS
    from megatron_dip.spec.errors import InputError
    from megatron_dip.spec.tuned import TUNED_FORMAT, TunedCut

    known: dict[str, type[msgspec.Struct]] = {}
    for kind, name in {**FORMATS, DeviceDescription: DEVICE_FORMAT, MeasuredSteps: MEASURED_STEPS_FORMAT, TunedCut: TUNED_FORMAT}.items():
        known.setdefault(name.split("/")[1], kind)
    if args.name is None:
        print("\n".join(known))
        return 0
    if args.name not in known:
        raise InputError("FORMAT", args.name, "is no format of ours", f"use one of {', '.join(known)}")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"megatron-dip {args.name}", **msgspec.json.schema(known[args.name])}
    print(msgspec.json.format(msgspec.json.encode(schema), indent=1).decode())
    return 0
