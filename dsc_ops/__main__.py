"""`python -m dsc_ops`: what was built and what was found on this machine."""

import argparse
import json

from dsc_ops import _library


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dsc_ops",
        description="Print what was built and what was found: versions, the CPU kernels in use, whether the CUDA "
        "kernels are loaded or why not. Send it with every bug report.",
        epilog="DSC_OPS_CPU_CAPABILITY=default|avx2|avx512|avx512_bf16 in the environment chooses the CPU kernels.",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    if parser.parse_args().json:
        print(json.dumps(_library.information(), indent=2))
    else:
        print(_library.report())


if __name__ == "__main__":
    main()
