"""A decoding method as `generate(custom_generate=FOLDER)` takes it: three tokens, greedily."""


def generate(model, input_ids, **kwargs):
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return model.generate(input_ids, **{**kwargs, "do_sample": False, "max_new_tokens": 3})
