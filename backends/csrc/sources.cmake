target_sources(portattn PRIVATE
    portattn/backends/csrc/launch.cpp
)
