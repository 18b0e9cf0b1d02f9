"""Numbers as published in "Understanding Reference Policies in DPO" (2407.13709), of BETA_DPO and SUMMARIZATION
elsewhere, to be seen beside ours.

Score: length-controlled win rate of AlpacaEval 2 in percent, one seed. Accuracy: on UltraFeedback's validation pairs.
"""

from math import nan

import pandas as pd

from analysis.seeds import COLLAPSED

_SELF = ["inf", "0.1", "0.05", "0.02", "0.01", "0.005"]
PREVIOUS = "0.1, previous work"  # Zephyr and Tulu-2-DPO, as others have trained them
_OTHER = ["10", "1", "0.1", "0.01", "0.005"]

TABLE_1 = pd.DataFrame(
    {
        "mistral-7b": [7.57, 13.42, 14.03, 13.29, 16.06, 16.25, 12.36],
        "tulu-2-7b": [8.50, 9.20, 9.38, 9.96, 10.46, 7.86, COLLAPSED],
    },
    index=pd.Index([_SELF[0], PREVIOUS, *_SELF[1:]], name="beta"),
)

TABLE_2 = pd.DataFrame(
    {
        "mistral-7b reward": [0.500, 0.718, 0.744, 0.746, 0.751, 0.766],
        "mistral-7b policy": [0.435, 0.495, 0.513, 0.544, 0.605, 0.704],
        "tulu-2-7b reward": [0.500, 0.773, 0.778, 0.766, 0.758, 0.750],
        "tulu-2-7b policy": [0.439, 0.462, 0.483, 0.536, 0.605, 0.680],
    },
    index=pd.Index(_SELF, name="beta"),
)

TABLE_3 = pd.DataFrame(
    {
        "score": [7.57, 16.25, 12.84, 13.63],
        "policy accuracy": [0.435, 0.605, 0.697, 0.602],
        "length": [205.0, 359.4, 744.5, 389.3],
        "beta": ["", "0.01", "100", "0.01"],
    },
    index=pd.Index(["SFT", "DPO", "posterior", "likelihood"], name="method"),
)

TABLE_4 = pd.DataFrame(
    {
        "mistral-7b, mistral-7b-instruct": [18.74, 20.25, 19.58, 17.18, 15.34],
        "mistral-7b, llama3-70b": [13.29, 9.59, 10.99, 15.37, 11.70],
        "tulu-2-7b, mistral-7b-instruct": [7.61, 7.85, COLLAPSED, COLLAPSED, COLLAPSED],
        "tulu-2-7b, llama3-70b": [9.79, 11.17, 10.31, 9.16, 3.29],
    },
    index=pd.Index(_OTHER, name="beta"),
)

TABLE_5 = pd.DataFrame(
    {"mistral-7b": [7.57, 16.25, 20.25, 15.37], "tulu-2-7b": [8.50, 10.46, 7.85, 11.17]},
    index=pd.Index(["SFT", "itself", "mistral-7b-instruct", "llama3-70b"], name="reference"),
)

TABLE_6 = pd.DataFrame(
    {"qwen2-1.5b": [4.82, 4.75, 5.00, 5.89, 4.91, 5.52, COLLAPSED]},
    index=pd.Index(["inf", "0.1", "0.05", "0.02", "0.01", "0.005", "0.001"], name="beta"),
)

TABLE_7 = pd.DataFrame(
    {"mistral-7b, already tuned at beta 0.01": [15.20, 16.75, 14.99, 15.07, 14.80]},
    index=pd.Index(_OTHER, name="beta"),
)

FIGURE_2 = ["EOS", "Sure", "course", "Yes", "Hello", "Please", "What", "!", "please", "safe"]  # most lowered first

# "beta-DPO" (2407.08639), Table 1: win rate in percent over the chosen answers of Anthropic HH, judged by GPT-4. Read
# in summaries of the paper, not in itself; its other rows, and Table 2, are left out for want of a source.
BETA_DPO = pd.DataFrame(
    {"DPO": [26.19, 42.78, 51.51], "beta-DPO": [30.18, 48.67, 57.07]},
    index=pd.Index(["Pythia 410M", "Pythia 1.4B", "Pythia 2.8B"], name="policy"),
)

# Anyscale, "Direct Preference Optimization with Synthetic Data" (2024), in percent of 1,050 articles of CNN/DailyMail,
# judged by Llama-3.1-70B with five questions each; win rates are over the untuned Mistral-7B-Instruct-v0.1.
SUMMARIZATION = pd.DataFrame(
    {
        "three right or more": [65.43, 43.05, 37.24],
        "four right or more": [25.71, 13.52, 10.00],
        "median compression": [11.58, 12.73, 8.05],
        "mean compression": [13.00, 14.34, 9.36],
        "too long": [0.0, 0.0, 0.0],
        "invalid characters": [0.0, 0.10, 0.0],
        "win rate": [74.0, nan, 64.8],
    },
    index=pd.Index(["DPO", "untuned", "GPT-4o"], name="policy"),
)

# Against DPO, each tuned by those who report it, one seed; each is the difference of scores in points.
OBJECTIVES = pd.DataFrame(
    [
        ("simpo", 5.5, "AlpacaEval 2 LC, Llama-3-8B-Instruct v0.2, README of princeton-nlp/SimPO"),
        ("r_dpo", -0.2, "AlpacaEval 2 LC, Llama-3-8B-Instruct v0.2, README of princeton-nlp/SimPO"),
        ("ipo", -1.4, "AlpacaEval 2 LC, Llama-3-8B-Instruct v0.2, README of princeton-nlp/SimPO"),
        ("orpo", -10.1, "AlpacaEval 2 LC, Llama-3-8B-Instruct v0.2, README of princeton-nlp/SimPO"),
        ("cpo", -14.1, "AlpacaEval 2 LC, Llama-3-8B-Instruct v0.2, README of princeton-nlp/SimPO"),
        ("slic", -14.3, "AlpacaEval 2 LC, Llama-3-8B-Instruct v0.2, README of princeton-nlp/SimPO"),
        ("alpha_dpo", 6.8, "AlpacaEval 2 LC, Llama-3-8B-Instruct v0.2, printed in the picture of junkangwu/alpha-DPO"),
        ("beta_dpo", 5.6, "win rate on HH, Pythia-2.8B, Table 1 of 2407.08639, with its filter"),
    ],
    columns=["objective", "minus DPO", "measured"],
).set_index("objective")
