target_sources(portattn PRIVATE
    portattn/plan/csrc/abi.cpp
    portattn/plan/csrc/documents.cpp
    portattn/plan/csrc/expr.cpp
    portattn/plan/csrc/leaves.cpp
    portattn/plan/csrc/pack.cpp
    portattn/plan/csrc/parts.cpp
    portattn/plan/csrc/planner.cpp
    portattn/plan/csrc/program_checks.cpp
    portattn/plan/csrc/schedule.cpp
    portattn/plan/csrc/segments.cpp
    portattn/plan/csrc/tile_eval.cpp
    portattn/plan/csrc/transpose.cpp
)
