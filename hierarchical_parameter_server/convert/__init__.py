"""Dissects a trained model: tables for the parameter server, a config, and the dense remainder that looks rows up.

    report = hps.convert("ranker.keras", "converted")
    report.dense_model.predict(batch)

The output folder holds

    ps.json                        config that serves the tables, ready to use
    <model>/<table>/key            int64 keys 0 .. rows - 1
    <model>/<table>/emb_vector     float32 rows
    dense.keras                    the model with its embeddings replaced by HPS layers (not for every source)
    conversion.json                the report
"""

from hierarchical_parameter_server.convert.converter import convert
from hierarchical_parameter_server.convert.layers import EmbeddingLookup, MeanLookup
from hierarchical_parameter_server.convert.report import ConversionReport, NotTaken, TableReport

__all__ = ["ConversionReport", "EmbeddingLookup", "MeanLookup", "NotTaken", "TableReport", "convert"]
