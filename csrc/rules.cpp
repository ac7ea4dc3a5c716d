#include "rules.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>

namespace immunize_ext {
namespace {

bool is_differentiated(const c10::IValue& argument) {
  const auto asked = [](const at::Tensor& t) { return is_recorded(t) || carries_tangent(t); };
  if (argument.isTensor())
    return asked(argument.toTensor());
  if (!argument.isTensorList())
    return false;
  const auto list = argument.toTensorList();
  return std::any_of(list.begin(), list.end(), [&](const at::Tensor& t) { return asked(t); });
}

void serve(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (std::any_of(arguments.begin(), arguments.end(), is_differentiated)) {
    op.redispatchBoxed(kRules, stack);
    return;
  }
  at::AutoDispatchBelowAutograd below;
  op.callBoxed(stack);
}

}  // namespace

void ask_before_rules(const std::string& name) {
  for (const auto key : {c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA}) {
    // Never destroyed: that would ask for the dispatcher as the process ends.
    auto* library =
        new torch::Library(torch::Library::IMPL, "immunize_ext", key, __FILE__, __LINE__);
    library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&serve>());
  }
}

}  // namespace immunize_ext
