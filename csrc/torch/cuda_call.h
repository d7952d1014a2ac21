// What one operator call needs of its device: made current, with its stream and memory.
#pragma once

#include "safelora/cuda.h"
#include "views.h"

namespace safelora::binding {

class Call {
 public:
  // For the device of `on`; without a tensor there is nothing to run.
  explicit Call(const Tensor* on);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  cuda::Stream stream() const;
  void admit(const Tensor& t, const char* name) const;

 private:
  struct State;
  State* state_;
};

}  // namespace safelora::binding
