"""What BAGEL and IRG publish, and what has to be known before comparing with it."""

COLUMNS = ("GenEval", "WISE, plain mean", "WISE, weighted", "TIIF short", "TIIF long",
           "GenAI-Bench", "OneIG-EN")

# As the tables of the IRG repository have them. WISE stands in the column of the formula that
# gives the published figure.
ROWS = {
    "BAGEL, published": {
        "GenEval": 0.78, "WISE, plain mean": 0.52, "TIIF short": 70.97, "TIIF long": 71.79,
        "GenAI-Bench": 0.79, "OneIG-EN": 0.361},
    "BAGEL self-CoT, published": {
        "GenEval": 0.79, "WISE, plain mean": 0.70, "TIIF short": 68.06, "TIIF long": 68.78,
        "GenAI-Bench": 0.81, "OneIG-EN": 0.324},
    "IRG (2 rounds), published": {
        "GenEval": 0.85, "WISE, plain mean": 0.77, "TIIF short": 76.00, "TIIF long": 73.77,
        "GenAI-Bench": 0.84, "OneIG-EN": 0.415},
}

# By benchmark and row: the categories that are published.
CATEGORIES = {
    "wise": {
        "BAGEL, published": {"CULTURE": 0.44, "TIME": 0.55, "SPACE": 0.68, "BIOLOGY": 0.44,
                             "PHYSICS": 0.60, "CHEMISTRY": 0.39, "plain mean": 0.52},
        "BAGEL self-CoT, published": {"CULTURE": 0.76, "TIME": 0.69, "SPACE": 0.75,
                                      "BIOLOGY": 0.65, "PHYSICS": 0.75, "CHEMISTRY": 0.58,
                                      "plain mean": 0.70},
    },
    "oneig": {
        "BAGEL, published": {"alignment": 0.769, "text": 0.244, "reasoning": 0.173,
                             "style": 0.367, "diversity": 0.251, "overall": 0.361},
        "BAGEL self-CoT, published": {"alignment": 0.793, "text": 0.020, "reasoning": 0.206,
                                      "style": 0.390, "diversity": 0.209, "overall": 0.324},
    },
}

CAVEATS = (
    "GenEval: the published rows are on the 553 original prompts; with rewritten ones BAGEL "
    "reports 0.88. BAGEL's own paper says 0.82 on the original ones; others get 0.78 to 0.80.",
    "WISE: BAGEL's figures are plain means of the six categories (0.517, self-CoT 0.697); the "
    "official weights make 0.501 and 0.717 of the same categories. IRG's 0.77 is most likely a "
    "plain mean, too, since its repository has that script; nothing says so.",
    "WISE: the official judge is gpt-4o-2024-05-13; BAGEL and IRG used gpt-4o-2024-11-20. "
    "WISE_Verified of 2026 has other prompts, another judge and other weights.",
    "WISE: a review quotes the paper's Table 4 with 0.79 for IRG's first round and 0.77 for its "
    "second, so the second round need not be the better one.",
    "TIIF: the testmini prompts, judged by Qwen2.5-VL-72B-Instruct; figures times 100. The "
    "official judge answers at temperature 1.0 to a template drawn at random, so that a second "
    "run differs.",
    "TIIF: the official summary pools the rounds that IRG's evaluator writes into one folder. "
    "Here they are apart.",
    "GenAI-Bench: which prompts (1600 or 527) and which judge the published rows are of is not "
    "said. The official default is 1600 prompts and clip-flant5-xxl; other judges' figures "
    "compare with each other only.",
    "OneIG-EN: the overall is the plain mean of the five parts. Re-runs of BAGEL by others are "
    "far from its official row (text 0.385 against 0.244).",
    "The settings of the published IRG rows are known for TIIF only; for the other benchmarks "
    "they are taken to be the same.",
)
