// The planner: a mask's distinct layouts, each planned pass by pass.
#include "planner.hpp"

#include <algorithm>
#include <map>
#include <memory>

#include "layout_planner.hpp"

namespace portattn {

namespace {

constexpr i64 kDefaultBitsBytes = i64{256} << 20;

struct Layout {
    Expr mask;
    std::vector<Group> groups;
    std::shared_ptr<const Segments> id, documents;
};

std::vector<Layout> resolve_layouts(pa_plan& plan, const Program& program, const Sizes& sizes) {
    pa_plan_view& v = plan.view;
    v.layout_batch = program.depends_on_batch() ? static_cast<int32_t>(sizes.batch) : 1;
    v.layout_heads = program.depends_on_head() ? static_cast<int32_t>(sizes.num_heads) : 1;
    std::map<std::vector<i64>, int32_t> known;
    std::vector<Layout> layouts;
    for (i64 b = 0; b < v.layout_batch; ++b)
        for (i64 h = 0; h < v.layout_heads; ++h) {
            auto found = known.emplace(program.fingerprint(b, h), static_cast<int32_t>(layouts.size()));
            if (found.second) {
                Layout layout;
                layout.mask = program.resolve(b, h);
                if (sizes.seqlen_q > 0 && sizes.seqlen_k > 0)
                    layout.groups = split(layout.mask, sizes, v.block_q, v.block_k);
                layout.documents = find_documents(layout.groups, sizes, v.block_q, v.block_k);
                if (layout.documents) {
                    layout.mask = inside_documents(layout.groups[0].mask, layout.documents.get());
                    layout.groups[0].mask = layout.mask;
                }
                layout.id = find_segments(layout.mask);
                plan.documents.push_back(layout.documents);
                layouts.push_back(std::move(layout));
            }
            plan.layouts.push_back(found.first->second);
        }
    v.num_layouts = static_cast<int32_t>(layouts.size());
    return layouts;
}

}  // namespace

pa_plan* make_plan(const pa_plan_args& args) {
    if (args.block_q < 1 || args.block_k < 1 || args.block_q > 4096 || args.block_k > 4096)
        throw PlanError{"block is (" + std::to_string(args.block_q) + ", " + std::to_string(args.block_k) +
                        "); each must be in 1..4096"};
    if (args.seqlen_q < 0 || args.seqlen_k < 0 || args.seqlen_q >= kMaxLength || args.seqlen_k >= kMaxLength)
        throw PlanError{"lengths " + std::to_string(args.seqlen_q) + " and " + std::to_string(args.seqlen_k) +
                        " must be in 0..2**30"};
    auto plan = std::make_unique<pa_plan>();
    pa_plan_view& v = plan->view;
    v.seqlen_q = args.seqlen_q;
    v.seqlen_k = args.seqlen_k;
    v.q_offset = args.q_offset;
    v.block_q = args.block_q;
    v.block_k = args.block_k;
    v.words_per_row = (args.block_k + 31) / 32;
    const Sizes sizes{args.batch, args.num_heads, args.seqlen_q, args.seqlen_k, args.q_offset};
    const Program program(args.program, args.program_len, args.arrays, args.num_arrays, sizes);
    const std::vector<Layout> layouts = resolve_layouts(*plan, program, sizes);
    std::vector<i64> steps;
    for (const Layout& layout : layouts)
        for (const Group& group : layout.groups)
            if (std::find(steps.begin(), steps.end(), group.row_step) == steps.end())
                steps.push_back(group.row_step);
    if (steps.empty()) steps.push_back(1);
    std::sort(steps.begin(), steps.end());
    BitStore bits(*plan, args.max_bits_bytes > 0 ? args.max_bits_bytes : kDefaultBitsBytes);
    std::vector<std::unique_ptr<LayoutPlanner>> planners;
    for (const Layout& layout : layouts)
        planners.push_back(std::make_unique<LayoutPlanner>(*plan, bits, sizes, layout.groups, layout.id.get(),
                                                           layout.documents.get()));
    plan->row_ptr.push_back(0);
    for (i64 step : steps) {
        plan->pass_steps.push_back(static_cast<int32_t>(step));
        for (auto& planner : planners) {
            planner->plan_pass(step);
            plan->row_ptr.push_back(static_cast<int32_t>(plan->rows.size() / kRowFields));
        }
    }
    std::vector<std::shared_ptr<const Segments>> segments;
    for (const Layout& layout : layouts) segments.push_back(layout.id);
    add_ids(*plan, segments);
    plan->seal();
    return plan.release();
}

}  // namespace portattn
