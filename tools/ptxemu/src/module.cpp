// SPDX-License-Identifier: Apache-2.0
// The public functions, and look-ups in a module.
#include "ir.h"
#include "machine.h"
#include "parser.h"

namespace ptxemu {

const Function& Module::function(const std::string& name) const {
  const auto found = function_index.find(name);
  if (found == function_index.end()) throw Error("launch", "no function " + name);
  return *functions[found->second];
}

const Function& Module::kernel(const std::string& name) const {
  const Function& f = function(name);
  if (!f.is_kernel) throw Error("launch", name + " is no kernel");
  return f;
}

std::string Module::source(int location) const {
  if (location < 0) return "";
  const auto text = [&](const Location& l) {
    const auto file = files.find(l.file);
    const std::string path = file == files.end() ? "?" : file->second;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(l.line);
  };
  std::string result = text(locations[location]);
  int outermost = location;
  while (locations[outermost].parent >= 0) outermost = locations[outermost].parent;
  if (outermost != location) result += ", inlined at " + text(locations[outermost]);
  return result;
}

std::shared_ptr<Module> load(const std::string& ptx) {
  auto module = std::make_shared<Module>();
  Parser(ptx, *module).run();
  return module;
}

std::vector<std::string> kernel_names(const Module& module) {
  std::vector<std::string> names;
  for (const auto& f : module.functions)
    if (f->is_kernel) names.push_back(f->name);
  return names;
}

std::vector<Parameter> parameters(const Module& module, const std::string& kernel) {
  static constexpr std::string_view kNames[] = {
      "none", "pred", "b8",  "b16", "b32", "b64",  "b128",  "u8",     "u16",  "u32", "u64",
      "s8",   "s16",  "s32", "s64", "f16", "bf16", "f16x2", "bf16x2", "tf32", "f32", "f64"};
  std::vector<Parameter> result;
  for (const ParameterSlot& slot : module.kernel(kernel).parameters)
    result.push_back(
        {slot.name, std::string(kNames[static_cast<int>(slot.type)]), slot.offset, slot.size});
  return result;
}

std::size_t static_shared(const Module& module, const std::string& kernel) {
  return module.kernel(kernel).shared_bytes;
}

std::vector<Unsupported> unsupported(const Module& module) {
  std::vector<Unsupported> result;
  for (const auto& f : module.functions)
    for (const Instruction& i : f->code)
      if (!i.handler) result.push_back({f->name, i.text, i.reason, i.ptx_line});
  return result;
}

std::pair<void*, std::size_t> variable(const Module& module, const std::string& name) {
  const auto found = module.variables.find(name);
  if (found == module.variables.end() ||
      (found->second.space != Space::kGlobal && found->second.space != Space::kConst))
    return {nullptr, 0};
  return {reinterpret_cast<void*>(found->second.address), found->second.size};
}

Stats launch(Module& module, const std::string& kernel, const LaunchConfig& config,
             const void* parameter_block, std::size_t parameter_bytes, const GlobalMemory& memory,
             const Options& options) {
  const Function& f = module.kernel(kernel);
  if (parameter_bytes < f.parameter_block)
    throw Error("launch", kernel + " takes " + std::to_string(f.parameter_block) +
                              " bytes of parameters; " + std::to_string(parameter_bytes) +
                              " were given");
  Machine machine(module, f, config, static_cast<const u8*>(parameter_block), memory, options);
  return machine.run();
}

}  // namespace ptxemu
