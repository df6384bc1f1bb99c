"""Settings that people give: fields of typed structs, and YAML files of them."""
