"""Published files of benchmarks: rows that stream, with images that are read when they are needed."""
