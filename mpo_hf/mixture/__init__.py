"""A mixture as a Transformers model. These files are all that travels to the Hub with one, and import no others of mpo_hf."""
