"""Study of published systems: what each claims, what comes out here, under which conditions.

python -m moesim.studies.systems -o reports/systems.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moesim.files import write_text
from moesim.studies import caching, pregated, scaling, schedules, stages, tiers, traffic
from moesim.studies.cases import Bench
from moesim.studies.claims import Section
from moesim.systems import SYSTEMS, System

COMMAND = "python -m moesim.studies.systems -o reports/systems.md"
STUDIES: dict[str, Callable[[Bench], Section]] = {
    "plain": schedules.plain_study,
    "deepspeed-moe": schedules.deepspeed_moe_study,
    "deepspeed-ted": traffic.ted_study,
    "tutel": schedules.tutel_study,
    "fsmoe": stages.fsmoe_study,
    "se-moe": schedules.se_moe_study,
    "two-batch": schedules.two_batch_study,
    "exflow": traffic.exflow_study,
    "hecate": traffic.hecate_study,
    "bigmac": traffic.bigmac_study,
    "lsh-moe": traffic.lsh_moe_study,
    "moe++": traffic.moepp_study,
    "pre-gated": pregated.pre_gated_study,
    "expertflow": caching.expertflow_study,
    "read-me": caching.read_me_study,
    "moe-infinity": caching.moe_infinity_study,
    "m2r2": caching.m2r2_study,
    "d2moe": tiers.d2moe_study,
    "edge-moe": tiers.edge_moe_study,
    "m3vit": tiers.m3vit_study,
    "sn40l": tiers.sn40l_study,
    "fiddler": tiers.fiddler_study,
    "elasticmoe": scaling.elasticmoe_study,
}
HEAD = f"""# Published systems, simulated

Made by `{COMMAND}`; do not edit. Same code, same bytes.

Every system is a composition of mechanisms (`moesim systems`), run by the event engine on planted routing. Three kinds of check that a
model of a system has to pass, and a fourth kind of row beyond them:

- **S**, structural: an identity or inequality that must hold exactly. *holds* or *DOES NOT HOLD*.
- **Q**, quantitative: against public ground truth, within the tolerance named. *agrees* or *does not agree*. Where constants were fitted to that very
  ground truth, the section says so.
- **B**, band: the sign must match and the published size must be reachable. *consistent* means just that under the conditions named: it is **not** a
  reproduction of the paper. *NOT REACHED* gives the figure that was.
- **H**, headline: the published figure beside ours where no check asks for it, or more closely than one asks. No claim either way, *reached* or
  *not reached*: what a headline was measured on is mostly not public.

Devices come from the shipped profiles. Not calibrated are the expert kernels of A100 and V100 (typical ones), NVLink 3 (scaled from measured
NVLink 4), InfiniBand (latency plus bytes over bandwidth), attention, gate and optimizer (rooflines), and copies from hosts and SSDs, but for the
pre-gated section's. Gains are ratios of simulated times.
"""


def study(names: Sequence[str]) -> list[Section]:
    """Sections of the named systems, in the order of `STUDIES`."""
    with Bench() as bench:
        return [run(bench) for name, run in STUDIES.items() if name in names]


def section_text(section: Section) -> str:
    """Markdown of one system."""
    rows = [f"| {c.kind} | {c.what} | {c.published} | {c.simulated} | {c.verdict} |" for c in section.claims]
    return "\n".join(
        [
            f"## {section.name}",
            "",
            section.about or _about(SYSTEMS[section.name]),
            "",
            "| kind | check | published | simulated | verdict |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"- **Published set-up**: {section.published}",
            f"- **Modelled**: {section.modelled}",
            f"- **Conditions**: {section.conditions}",
            f"- **What differs**: {section.differs}",
            "",
        ]
    )


def _about(system: System) -> str:
    return f"{system.title}. {system.paper}. Claims: {system.headline}."


def report(sections: Sequence[Section]) -> str:
    """The whole report: what holds at a glance, what does not, then every system."""
    glance = ["| system | S checks that hold | Q checks that agree | B checks that are consistent | H figures reached |", "|---|---|---|---|---|"]
    for section in sections:
        counts = [[c.ok for c in section.claims if c.kind == kind] for kind in "SQBH"]
        glance.append(f"| {section.name} | " + " | ".join(f"{sum(oks)} of {len(oks)}" if oks else "–" for oks in counts) + " |")
    parts = [HEAD, "## At a glance", "", *glance, "", "## Checks that do not pass", "", *_missed(sections, "SQB"), ""]
    parts += ["## Headlines that are not reached", "", *_missed(sections, "H"), "", *map(section_text, sections)]
    return "\n".join(parts)


def _missed(sections: Sequence[Section], kinds: str) -> list[str]:
    """What is not as published, with both figures."""
    rows = [(s.name, c) for s in sections for c in s.claims if c.kind in kinds and not c.ok]
    return [f"- **{name}**, {c.what}: published {c.published}, simulated {c.simulated}." for name, c in rows] or ["- none in these sections"]


def main() -> None:
    """Run every study and write the report."""
    parser = argparse.ArgumentParser(prog="python -m moesim.studies.systems", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the Markdown file to write, replacing what is there")
    output = parser.parse_args().output
    sections = study(list(STUDIES))
    write_text(output, report(sections))
    wrong = [f"{section.name}: {claim.what}" for section in sections for claim in section.claims if claim.kind == "S" and not claim.ok]
    if wrong:
        sys.exit(f"structural checks do not hold: {'; '.join(wrong)}; see {output}")


if __name__ == "__main__":
    main()
