"""Arguments of the verbs, by family. Nothing heavy is imported: --help is instant."""
