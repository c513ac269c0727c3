"""Numbers of the SWITCH paper (Koo et al., Findings of NAACL 2025, arXiv 2410.19503), and the share that is ours."""

# The share that a run calibrates its threshold for, where it names none, and that of the controls. At the paper's best setting the
# teacher writes 53 % of the tokens. On the embedded pair 20 % is better than 10 %, for the same forwards, and 53 % no better
# (docs/results/study.md, "How much by the teacher").
DEFAULT_SHARE = 0.2
# The paper's best decay factor, in the one of its two readings that is the default here; see `Switch`.
PAPER_FINAL_FRACTION = 0.1
