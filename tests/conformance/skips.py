"""
The tests of Transformers that are not run against a mixture, each with the property of a mixture that rules it out.

Tests that Transformers itself skips, for a model of this kind or on a machine of this kind, are not listed here.
"""

# Marks a skip as one of ours in a report.
OURS = "mixture: "

# name of a test, or of a parameterized family of tests -> reason
ALL: dict[str, str] = {
    "test_config_parts_by_name": (
        "it has any number of components, so their configs are a list in its config file and not a field each"
    ),
    "test_resize_embeddings_untied": (
        "its components have a table of embeddings each; Transformers' own composite models are exempt as well"
    ),
    "test_resize_embeddings_untied_no_reinit_on_post_init": (
        "its components have a table of embeddings each; Transformers' own composite models are exempt as well"
    ),
    "test_resize_tokens_embeddings": (
        "its components have a table of embeddings each; Transformers' own composite models are exempt as well"
    ),
}

GRADIENT_CHECKPOINTING = (
    "adapters take turns on one base, whose layers would be computed again with the last of them; this is refused"
)

# for mixtures of adapters over one base, in addition
ADAPTERS: dict[str, str] = {
    "test_load_save_without_tied_weights": "it is saved as references to a base and adapters, without weights",
    "test_training_gradient_checkpointing": GRADIENT_CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_false": GRADIENT_CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_true": GRADIENT_CHECKPOINTING,
    "test_model_weights_reload_no_missing_tied_weights": (
        "it is saved as references to a base and adapters, without weights"
    ),
}
