"""From a mask to what a kernel walks: plans, schedules and their cache."""

from portattn.plan.cache import plan_mask
from portattn.plan.device import DevicePlan, DeviceSchedule, to_device
from portattn.plan.plan import Plan
from portattn.plan.schedule import Schedule

__all__ = ["DevicePlan", "DeviceSchedule", "Plan", "Schedule", "plan_mask", "to_device"]
