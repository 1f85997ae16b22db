# One source per instruction set, each with its own flags; which one runs is decided at run time (isa.cpp).
set(PA_CPU_SOURCE_DIR portattn/backends/cpu/csrc)
set(PA_CPU_ISA_SOURCES)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    foreach(level 2 3 4)
        list(APPEND PA_CPU_ISA_SOURCES ${PA_CPU_SOURCE_DIR}/isa_v${level}.cpp)
        set_source_files_properties(${PA_CPU_SOURCE_DIR}/isa_v${level}.cpp PROPERTIES
            COMPILE_OPTIONS "-march=x86-64-v${level}")
    endforeach()
    set_property(SOURCE ${PA_CPU_SOURCE_DIR}/isa_v4.cpp APPEND PROPERTY
        COMPILE_OPTIONS "-mprefer-vector-width=512" "-Wno-uninitialized" "-Wno-maybe-uninitialized")  # GCC 12 headers
    list(APPEND PA_CPU_ISA_SOURCES ${PA_CPU_SOURCE_DIR}/isa_amx.cpp)
    set_source_files_properties(${PA_CPU_SOURCE_DIR}/isa_amx.cpp PROPERTIES COMPILE_OPTIONS
        "-march=x86-64-v4;-mavx512bf16;-mamx-tile;-mamx-bf16;-mprefer-vector-width=512;-Wno-uninitialized;-Wno-maybe-uninitialized")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    list(APPEND PA_CPU_ISA_SOURCES ${PA_CPU_SOURCE_DIR}/isa_neon.cpp)
else()
    message(FATAL_ERROR "portattn has CPU kernels for x86-64 and aarch64, not for ${CMAKE_SYSTEM_PROCESSOR}")
endif()

target_sources(portattn PRIVATE
    ${PA_CPU_ISA_SOURCES}
    ${PA_CPU_SOURCE_DIR}/backward_driver.cpp
    ${PA_CPU_SOURCE_DIR}/driver.cpp
    ${PA_CPU_SOURCE_DIR}/isa.cpp
    ${PA_CPU_SOURCE_DIR}/limits.cpp
    ${PA_CPU_SOURCE_DIR}/memory.cpp
    ${PA_CPU_SOURCE_DIR}/rows.cpp
    ${PA_CPU_SOURCE_DIR}/threads.cpp
)
