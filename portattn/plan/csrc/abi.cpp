// The C boundary of planner and scheduler: exceptions become messages.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "expr.hpp"
#include "planner.hpp"

void pa_plan::seal() {
    view.num_passes = static_cast<int32_t>(pass_steps.size());
    view.num_rows = static_cast<int32_t>(rows.size() / portattn::kRowFields);
    view.num_tiles = static_cast<int32_t>(tiles.size() / portattn::kTileFields);
    view.num_runs = static_cast<int32_t>(runs.size() / portattn::kRunFields);
    view.num_bit_tiles =
        static_cast<int32_t>(bits.size() / static_cast<size_t>(view.block_q * view.words_per_row));
    view.has_steps = 0;
    for (int32_t step : pass_steps) view.has_steps |= step != 1;
    for (size_t n = 0; n < tiles.size(); n += portattn::kTileFields) view.has_steps |= tiles[n + 1] != 1;
    for (size_t n = 0; n < runs.size(); n += portattn::kRunFields) view.has_steps |= runs[n + 1] != 1;
    view.layouts = layouts.data();
    view.layout_ids = layout_ids.data();
    view.pass_steps = pass_steps.data();
    view.row_ptr = row_ptr.data();
    view.rows = rows.data();
    view.tiles = tiles.data();
    view.runs = runs.data();
    view.bits = bits.data();
    view.bit_ranges = bit_ranges.data();
}

namespace {

template <class Function>
auto guarded(char* err, int64_t err_len, Function function) -> decltype(function()) {
    auto report = [&](const char* message) {
        if (err && err_len > 0) {
            std::strncpy(err, message, static_cast<size_t>(err_len - 1));
            err[err_len - 1] = 0;
        }
    };
    try {
        return function();
    } catch (const portattn::PlanError& error) {
        report(error.message.c_str());
    } catch (const std::bad_alloc&) {
        report("out of memory while planning");
    } catch (const std::exception& error) {
        report(error.what());
    }
    return nullptr;
}

}  // namespace

extern "C" {

uint32_t portattn_abi_version(void) { return PA_ABI_VERSION; }

pa_plan* portattn_plan_create(const pa_plan_args* args, char* err, int64_t err_len) {
    return guarded(err, err_len, [&]() -> pa_plan* {
        if (args->struct_size != sizeof(pa_plan_args) || args->abi_version != PA_ABI_VERSION)
            throw portattn::PlanError{"pa_plan_args has another size or ABI version; rebuild the caller"};
        return portattn::make_plan(*args);
    });
}

void portattn_plan_destroy(pa_plan* plan) { delete plan; }

const pa_plan_view* portattn_plan_view(const pa_plan* plan) {
    plan->make_ids();
    return &plan->view;
}

const pa_plan_view* portattn_plan_view_without_ids(const pa_plan* plan) { return &plan->view; }

const uint16_t* portattn_plan_bits_by_key(const pa_plan* plan) {
    std::call_once(plan->by_key_once, [plan] {
        const pa_plan_view& v = plan->view;
        const int64_t panels = (v.block_q + 15) / 16;
        plan->bits_by_key.assign(static_cast<size_t>(v.num_bit_tiles * panels * v.block_k), 0);
        for (int64_t tile = 0; tile < v.num_bit_tiles; ++tile)
            for (int64_t r = 0; r < v.block_q; ++r) {
                const uint32_t* row = v.bits + (tile * v.block_q + r) * v.words_per_row;
                uint16_t* to = plan->bits_by_key.data() + (tile * panels + r / 16) * v.block_k;
                for (int64_t c = 0; c < v.block_k; ++c)
                    to[c] = static_cast<uint16_t>(to[c] | (((row[c >> 5] >> (c & 31)) & 1u) << (r % 16)));
            }
    });
    return plan->bits_by_key.data();
}

pa_plan* portattn_plan_transpose(const pa_plan* plan, char* err, int64_t err_len) {
    return guarded(err, err_len, [&] { return portattn::transpose_plan(*plan); });
}

pa_schedule* portattn_schedule_create(const pa_plan* plan, const pa_schedule_args* args, char* err,
                                      int64_t err_len) {
    return guarded(err, err_len, [&]() -> pa_schedule* {
        if (args->struct_size != sizeof(pa_schedule_args) || args->abi_version != PA_ABI_VERSION)
            throw portattn::PlanError{"pa_schedule_args has another size or ABI version; rebuild the caller"};
        return portattn::make_schedule(*plan, *args);
    });
}
}
