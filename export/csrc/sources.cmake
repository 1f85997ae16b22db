# The ONNX Runtime op. Needs no ONNX Runtime headers or library.
target_sources(portattn PRIVATE
    portattn/export/csrc/attention_inputs.cpp
    portattn/export/csrc/attention_node.cpp
    portattn/export/csrc/ort_op.cpp
    portattn/export/csrc/plan_cache.cpp
)
target_include_directories(portattn PRIVATE portattn/backends/cpu/csrc)
