"""What SogCLRLoss is asked that is wrong or degenerate, beside what every loss is asked."""

from test_bad_input_losses import DEGENERATE_BATCHES, EMBEDDING_ERRORS, LOSS_CONSTRUCTOR_ERRORS, int64

FORWARD_ERRORS = EMBEDDING_ERRORS | {
    "index is None": ({"index": None}, TypeError, "index"),
    "an index is past the items": ({"index": int64(0, 1, 10, 2)}, ValueError, "index"),
    "return_stats is a number": ({"return_stats": 1}, TypeError, "return_stats"),
    "return_stats is None": ({"return_stats": None}, TypeError, "return_stats"),
    "all is elsewhere": (
        {name: EMBEDDING_ERRORS["z1 is elsewhere"][0]["z1"] for name in ("z0", "z1")},
        ValueError,
        "z0",
    ),
}

LEARNED = {"individual_temperature": True}
CONSTRUCTOR_ERRORS = LOSS_CONSTRUCTOR_ERRORS | {
    "num_items is 0": ({"num_items": 0}, ValueError, "num_items"),
    "num_items is a float": ({"num_items": 10.0}, TypeError, "num_items"),
    "num_items is a bool": ({"num_items": True}, TypeError, "num_items"),
    "num_items exceeds the ids": ({"num_items": 2**40 + 1}, ValueError, "num_items"),
    "gamma is 0": ({"gamma": 0.0}, ValueError, "gamma"),
    "gamma is above 1": ({"gamma": 1.5}, ValueError, "gamma"),
    "gamma is NaN": ({"gamma": float("nan")}, ValueError, "gamma"),
    "gamma is None": ({"gamma": None}, TypeError, "gamma"),
    "gamma is a bool": ({"gamma": True}, TypeError, "gamma"),
    "gamma is a word": ({"gamma": "0.9"}, TypeError, "gamma"),
    "gamma_schedule is a typo": ({"gamma_schedule": "cos"}, ValueError, "gamma_schedule"),
    "cosine without its length": ({"gamma_schedule": "cosine"}, TypeError, "gamma_steps"),
    "cosine over no steps": ({"gamma_schedule": "cosine", "gamma_steps": 0}, ValueError, "gamma_steps"),
    "cosine over half a step": ({"gamma_schedule": "cosine", "gamma_steps": 0.5}, TypeError, "gamma_steps"),
    "gamma_steps of a constant": ({"gamma_steps": 100}, ValueError, "gamma_steps"),
    "individual_temperature is a number": ({"individual_temperature": 0.1}, TypeError, "individual_temperature"),
    "temperature_lr is negative": (LEARNED | {"temperature_lr": -0.1}, ValueError, "temperature_lr"),
    "temperature_lr is infinite": (LEARNED | {"temperature_lr": float("inf")}, ValueError, "temperature_lr"),
    "temperature_momentum is 1": (LEARNED | {"temperature_momentum": 1.0}, ValueError, "temperature_momentum"),
    "temperature_momentum is a word": (LEARNED | {"temperature_momentum": "0"}, TypeError, "temperature_momentum"),
    "rho is negative": (LEARNED | {"rho": -1}, ValueError, "rho"),
    "rho is NaN": (LEARNED | {"rho": float("nan")}, ValueError, "rho"),
    "one bound": (LEARNED | {"temperature_bounds": 0.1}, TypeError, "temperature_bounds"),
    "three bounds": (LEARNED | {"temperature_bounds": (0.01, 0.1, 1)}, TypeError, "temperature_bounds"),
    "bounds are words": (LEARNED | {"temperature_bounds": ("0.01", "1")}, TypeError, "temperature_bounds"),
    "lowest is 0": (LEARNED | {"temperature_bounds": (0, 1)}, ValueError, "temperature_bounds"),
    "lowest is above it": (LEARNED | {"temperature_bounds": (0.1, 1)}, ValueError, "temperature_bounds"),
    "highest is below it": (LEARNED | {"temperature_bounds": (0.01, 0.05)}, ValueError, "temperature_bounds"),
    "highest is infinite": (LEARNED | {"temperature_bounds": (0.01, float("inf"))}, ValueError, "temperature_bounds"),
    "bimodal is a word": ({"bimodal": "yes"}, TypeError, "bimodal"),
    "gather is a typo": ({"gather": "some"}, ValueError, "gather"),
    "gather is a bool": ({"gather": True}, ValueError, "gather"),
    "backend is unknown": ({"backend": "fpga"}, ValueError, "backend"),
    "an unknown argument": ({"temprature": 0.1}, TypeError, ".*temprature"),
}

DEGENERATE = {name: change for name, change in DEGENERATE_BATCHES.items() if "statistics" not in name}
