"""Certificates and estimates for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GIB = 2**30


def where(one: Mapping[str, Any]) -> str:
    return " x ".join(f"{name} {n}" for name, n in one["mesh"].items() if n > 1) or "one chip"


def estimated(one: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """An estimate."""
    m, s = one["memory"], one["state"]
    return [
        f"{about['config']}, arm {about['arm']}, on {one['topology']} ({one['chips']} chips): {where(one)}",
        f"a chip holds: parameters {s['parameters'] / GIB:.3f} GiB, optimizer {s['optimizer'] / GIB:.3f} GiB, frozen "
        f"{s['frozen'] / GIB:.3f} GiB",
        "temporaries: " + ", ".join(f"{name} {n / GIB:.3f} GiB" for name, n in one["temporaries"].items()),
        f"estimate: {'fits' if one['fits'] else 'does not fit'}, {m['peak'] / GIB:.2f} of {one['hbm'] / GIB:.1f} GiB",
    ]


def verdict(one: Mapping[str, Any]) -> str:
    """One line."""
    if "refused" in one:
        return str(one["refused"])
    if "seconds" not in one:
        return f"does not fit: {one['compiler']}"
    fit = "fits" if one["fits"] else "does not fit"
    start = f"{fit}, {one['memory']['peak'] / GIB:.2f} of {one['hbm'] / GIB:.1f} GiB; at least "
    if one.get("step", "train") == "train":
        return start + f"{max(one['seconds'].values()):.3f} s a step, MFU at most {one['mfu_ceiling']:.0%}"
    rate = f"{one['tokens_per_second']:,.0f} tokens a second at most"
    if one["step"] == "decode":
        return start + f"{1e3 * one['least_seconds']:.2f} ms a token, {rate}"
    return start + f"{one['least_seconds']:.3f} s to read the prompts, {rate}, MFU at most {one['mfu_ceiling']:.0%}"


def text(one: Mapping[str, Any], about: Mapping[str, Any], advice: list[str]) -> list[str]:
    """A certificate; `advice`: what would fit, where this does not."""
    place = f"on {one['topology']} ({one['chips']} chips): {where(one)}"
    out = [f"{about['config']}, arm {about['arm']}, {one['step']}, {place}"]
    state = ", ".join(f"{name} {size / GIB:.3f} GiB" for name, size in one["state"].items())
    if one["step"] == "train":
        of = one["train"]
        out.append(
            f"{one['parameters']:,} parameters; {of['batch']} rows of {of['seq_len']} tokens "
            f"({of['batch'] * of['seq_len']:,}) a step in {of['accumulate']} parts, remat {one['remat']}"
        )
    else:
        of = one["serve"]
        kept = f", cache in {of['quantize']}" if of["quantize"] else ""
        out.append(
            f"{one['parameters']:,} parameters in {one['dtype']['parameters']}; {of['batch']} texts of "
            f"{of['length']:,} tokens{kept}"
        )
    out.append(f"a chip holds: {state}")
    if "seconds" in one:
        m, s, f = one["memory"], one["seconds"], one["flops"]
        out += [
            f"compiled: arguments {m['arguments'] / GIB:.3f} GiB, temporaries {m['temporaries'] / GIB:.3f} GiB",
            *(
                f"{kind}: {row['sites']} in the program, {row['runs']} runs, {row['bytes'] / 1e9:.3f} GB leave a chip"
                for kind, row in one["collectives"].items()
            ),
            f"FLOPs: {f['analytic']:.4g} by formula, {f['compiled']:.4g} compiled ({f['ratio']:.3f} times)",
            f"memory traffic: {one['bytes'] / 1e9:.3f} GB a chip",
            "seconds, at least: " + ", ".join(f"{name} {value:.4f}" for name, value in s.items()),
            f"bound by: {one['bound']}",
        ]
        if one["not_counted"]:
            out.append(f"calls that say nothing of their work, not counted: {', '.join(one['not_counted'])}")
        if one["loops_of_unknown_length"]:
            out.append(f"loops whose length the program does not say, counted once: {one['loops_of_unknown_length']}")
    out.append(verdict(one))
    if not one["fits"]:
        needed = one["memory"].get("peak")
        if needed:
            out.append(f"needed: {needed / GIB:.2f} of {one['hbm'] / GIB:.1f} GiB")
        out.append("a chip's largest tensors:")
        out += [f"  {r['bytes'] / GIB:8.3f} GiB  {r['name']} {r['shape']} {r['spec']}" for r in one["largest"]]
        out.append("its largest temporaries:")
        out += [f"  {r['bytes'] / GIB:8.3f} GiB  {r['shape']} {r['kind']}" for r in one["largest_temporaries"]]
        out.append("to change, any one of these (what a chip holds then, by the estimate):" if advice else NOTHING)
        out += [f"  {line}" for line in advice]
    return out


NOTHING = "to change: nothing alone fits by the estimate; a larger slice with more tensor or sequence"
